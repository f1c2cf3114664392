"""Bytes on the wire: requests (JSON), results (safetensors), failures (RQ's exception strings).

No pickle, and nothing is called or imported that the bytes name: a request for any other function than ours is
refused. Knows neither Redis nor keys. Every decoder raises WireError and nothing else on foreign bytes.

A request is RQ's `data` field: zlib of the JSON array [function, instance, args, kwargs]; the zlib layer is
left out of small requests, which RQ reads too. A result is one safetensors file: the tensor `embeddings` (n, d), or
of token output `token_embeddings` (sum of num_tokens, d), the texts' tokens one after the other. Its metadata are the
fields of `Embeddings` by name, those that are not text as JSON; `timings` is an array in the order of `Timings`, and
what is not there has its default.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import InvalidRequestError, JobFailedError, WireError
from embedq.producer.options import EmbedOptions, check_texts

#: The RQ function of every job of ours, by path, so that enqueueing imports no torch.
FUNCTION = "embedq.worker.tasks.embed"
#: Raised when a request can no longer be read by older workers.
VERSION = 1
#: Requests below so many bytes are not compressed: zlib's call would cost more than it saves.
COMPRESS_FROM_BYTES = 256
#: What a request may grow to; MAX_JOB_CHARS of four bytes each, escaped, is below it.
MAX_REQUEST_BYTES = 128 * 1024 * 1024

#: The tensor that holds a result's vectors, by `output`.
TENSOR_NAMES = {"sentence": "embeddings", "tokens": "token_embeddings"}

#: What safetensors calls the number types of results, by numpy's own little-endian names.
_DTYPES = {"<f4": "F32", "<f2": "F16", "|i1": "I8", "|u1": "U8"}

#: The order of `timings` in a result's metadata: an array, because names would be a third of a float16 result's header.
_TIMINGS = tuple(Timings.__dataclass_fields__)
#: Left out of a result's metadata where they say what they say by default: every byte is there for every job.
_DEFAULTS = {"output": "sentence", "calibration": ""}

#: A safetensors file begins with its header's length, 8 bytes little-endian, of which the last four are zero
#: in any sane file; JSON never holds a zero byte.
_SAFETENSORS_MARK = b"\0\0\0\0{"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One job's work, as decoded and checked."""

    texts: list[str]
    options: EmbedOptions


def encode_request(texts: Sequence[str], options: EmbedOptions) -> bytes:
    """The `data` field of a job. The same request gives the same bytes."""
    return pack_request(plain_request(texts, options))


def plain_request(texts: Sequence[str], options: EmbedOptions) -> bytes:
    """A request before its compression, which is not the same everywhere."""
    return _HEAD + orjson.dumps(texts) + _tail(options)


def pack_request(plain: bytes) -> bytes:
    return zlib.compress(plain, 1) if len(plain) >= COMPRESS_FROM_BYTES else plain


def is_same_request(stored: bytes, data: bytes) -> bool:
    """Whether a job's `data` field says what `encode_request` gave here. RQ's tools compress it in their own way when
    they write a job anew, and so may a client elsewhere.
    """
    try:
        return stored == data or _decompress(stored) == _decompress(data)
    except WireError:
        return False


_HEAD = b'["%s",null,[],{"texts":' % FUNCTION.encode()


@lru_cache(maxsize=256)
def _tail(options: EmbedOptions) -> bytes:
    """What follows the texts: the same for thousands of requests."""
    return b"," + orjson.dumps({**options.to_mapping(), "version": VERSION})[1:] + b"]"


def decode_request(data: bytes) -> EmbedRequest:
    """Raises WireError for anything but a request of ours, with the reason on one line."""
    if not data:
        raise WireError("the job has no data")
    call = _loads(_decompress(data))
    if not isinstance(call, list) or len(call) != 4:
        raise WireError("the job's data is not an RQ call of four parts")
    function, instance, args, kwargs = call
    if function != FUNCTION or instance is not None:
        raise WireError(f"the job asks for {str(function)[:80]!r}; this worker runs {FUNCTION} alone")
    if args or not isinstance(kwargs, dict):
        raise WireError("the job's arguments are not keywords")
    return check_kwargs(kwargs)


def check_kwargs(kwargs: Mapping[str, Any]) -> EmbedRequest:
    """The keywords of `embed` as a request. Raises WireError for a version, text or option that can't be."""
    options = dict(kwargs)
    version = options.pop("version", VERSION)
    if version != VERSION:
        raise WireError(f"the request has version {str(version)[:20]}; this worker reads version {VERSION}")
    try:
        return EmbedRequest(check_texts(options.pop("texts", ())), _read_options(options))
    except InvalidRequestError as err:
        raise WireError(str(err)) from err


def _read_options(options: Mapping[str, Any]) -> EmbedOptions:
    """Most jobs ask for what the one before asked for: checked once, and the same object."""
    try:
        return _checked_options(orjson.dumps(options))
    except orjson.JSONEncodeError:
        return EmbedOptions.from_mapping(options)


# By the JSON, not by the values: 1 and true are equal, but only one of them is a switch.
@lru_cache(maxsize=256)
def _checked_options(plain: bytes) -> EmbedOptions:
    return EmbedOptions.from_mapping(orjson.loads(plain))


def encode_result(result: Embeddings) -> bytes:
    """A safetensors file with one tensor of TENSOR_NAMES and all else as metadata strings.

    Written by hand, as the format's README has it: 8 bytes with the header's length, the header padded by spaces to a
    multiple of 8, the numbers. A worker does this for every job, and the library takes four times as long.
    """
    vectors = result.vectors
    metadata = {
        "version": str(VERSION),
        "model": result.model,
        "revision": result.revision,
        "worker": result.worker,
        "num_tokens": orjson.dumps(result.num_tokens).decode(),
        "timings": orjson.dumps([getattr(result.timings, name) for name in _TIMINGS]).decode(),
    }
    if any(result.truncated):
        metadata["truncated"] = orjson.dumps(result.truncated).decode()
    metadata |= {name: value for name, default in _DEFAULTS.items() if (value := getattr(result, name)) != default}
    tensor = {"dtype": _DTYPES[vectors.dtype.str], "shape": vectors.shape, "data_offsets": (0, vectors.nbytes)}
    header = orjson.dumps({"__metadata__": metadata, TENSOR_NAMES[result.output]: tensor})
    header += b" " * (-len(header) % 8)
    rows: Any = vectors if vectors.flags.c_contiguous else vectors.copy()
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(rows).cast("B")))


def decode_result(blob: bytes) -> Embeddings:
    """Raises WireError if these are not the bytes of `encode_result`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(blob)
        metadata = orjson.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
        output = metadata.get("output", _DEFAULTS["output"])
        vectors = tensors[TENSOR_NAMES[output]]
        result = Embeddings(
            vectors=vectors,
            num_tokens=(num_tokens := tuple(orjson.loads(metadata["num_tokens"]))),
            truncated=tuple(orjson.loads(metadata["truncated"]))
            if "truncated" in metadata
            else (False,) * len(num_tokens),
            model=metadata["model"],
            revision=metadata["revision"],
            worker=metadata["worker"],
            timings=Timings(**dict(zip(_TIMINGS, orjson.loads(metadata["timings"]), strict=True))),
            output=output,
            calibration=metadata.get("calibration", _DEFAULTS["calibration"]),
        )
        num_rows = sum(result.num_tokens) if output == "tokens" else len(result.num_tokens)
    except (SafetensorError, KeyError, TypeError, ValueError) as err:
        raise WireError(f"the result in Redis cannot be read: {err}") from err
    if vectors.ndim != 2 or len(vectors) != num_rows or len(result.num_tokens) != len(result.truncated):
        raise WireError("the result in Redis is at odds with itself: rows and token counts differ")
    return result


def is_result(blob: bytes) -> bool:
    return blob[4:9] == _SAFETENSORS_MARK


def encode_exc_string(failure: JobFailedError) -> bytes:
    """What RQ's result stream holds for a failed job: the error as the last line of a traceback."""
    line = f"{JobFailedError.__module__}.{JobFailedError.__name__}: {failure}"
    return base64.b64encode(zlib.compress(line.encode(errors="backslashreplace"), 1))


def decode_exc_string(field: bytes) -> JobFailedError:
    """The failure in a result stream's `exc_string`, whichever worker wrote it. Raises WireError."""
    try:
        packed = base64.b64decode(field, validate=True)
    except binascii.Error as err:
        raise WireError("the failure in Redis is not base64") from err
    return JobFailedError.parse(_decompress(packed).decode(errors="replace"))


def _loads(plain: bytes) -> Any:
    try:
        return orjson.loads(plain)
    except orjson.JSONDecodeError as err:
        raise WireError(f"the job's data is not JSON: {err}") from err


def _decompress(data: bytes) -> bytes:
    """Inflate with a bound, so that a small field cannot become gigabytes; bytes that aren't zlib stay."""
    if data[:1] == b"[":  # JSON; zlib's first byte is another, and trying would cost more than all the rest
        return data
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, MAX_REQUEST_BYTES)
    except zlib.error:
        return data
    if inflater.unconsumed_tail:
        raise WireError(f"the data inflates to more than {MAX_REQUEST_BYTES:,} bytes")
    if not inflater.eof:
        raise WireError("the data is cut short")
    return plain
