"""Bytes on the wire: requests (JSON), results (safetensors), failures (RQ's exception strings).

No pickle, and nothing is called or imported that the bytes name: a request for any other function than ours is
refused. Knows neither Redis nor keys. Every decoder raises WireError and nothing else on foreign bytes.

A request is RQ's `data` field: zlib of the JSON array [function, instance, args, kwargs]; the zlib layer is
left out of small requests, which RQ reads too. A result is one safetensors file: the tensor `embeddings` (n, d), or
of token output `token_embeddings` (sum of num_tokens, d), the texts' tokens one after the other.
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
        return EmbedRequest(check_texts(options.pop("texts", ())), EmbedOptions.from_mapping(options))
    except InvalidRequestError as err:
        raise WireError(str(err)) from err


def encode_result(result: Embeddings) -> bytes:
    """A safetensors file with one tensor of TENSOR_NAMES and all else as metadata strings."""
    from safetensors.numpy import save

    metadata = {
        "version": str(VERSION),
        "model": result.model,
        "revision": result.revision,
        "worker": result.worker,
        "num_tokens": orjson.dumps(result.num_tokens).decode(),
        "truncated": orjson.dumps(result.truncated).decode(),
        "timings": orjson.dumps(result.timings).decode(),
        "output": result.output,
        "calibration": result.calibration,
    }
    return save({TENSOR_NAMES[result.output]: result.vectors}, metadata)


def decode_result(blob: bytes) -> Embeddings:
    """Raises WireError if these are not the bytes of `encode_result`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(blob)
        metadata = orjson.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
        output = metadata.get("output", "sentence")
        vectors = tensors[TENSOR_NAMES[output]]
        result = Embeddings(
            vectors=vectors,
            num_tokens=tuple(orjson.loads(metadata["num_tokens"])),
            truncated=tuple(orjson.loads(metadata["truncated"])),
            model=metadata["model"],
            revision=metadata["revision"],
            worker=metadata["worker"],
            timings=Timings(**orjson.loads(metadata["timings"])),
            output=output,
            calibration=metadata.get("calibration", ""),
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
