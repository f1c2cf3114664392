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
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from embedq.producer.checks import is_int, shown
from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import InvalidRequestError, JobFailedError, NewerVersionError, WireError
from embedq.producer.options import MAX_JOB_CHARS, MAX_TEXTS_PER_JOB, EmbedOptions, check_texts

#: The RQ function of every job of ours, by path, so that enqueueing imports no torch.
FUNCTION = "embedq.worker.tasks.embed"
#: Raised when a request can no longer be read by older workers, which leave it for newer ones; what came before is
#: still read. And when a result can no longer be read by older clients.
VERSION = 1
RESULT_VERSION = 1
#: No version of ours: what has a higher one is foreign.
MAX_VERSION = 1000
#: Requests below so many bytes are not compressed: zlib's call would cost more than it saves.
COMPRESS_FROM_BYTES = 256
#: What a request may grow to; MAX_JOB_CHARS of four bytes each, escaped, is below it.
MAX_REQUEST_BYTES = 128 * 1024 * 1024
#: What a job's `data` may have in Redis, where a request of MAX_JOB_CHARS is compressed; claim.lua knows the number.
MAX_DATA_BYTES = 64 * 1024 * 1024
#: Values that one request may hold, its texts and options with their names. Parsed, three bytes of JSON become sixty.
MAX_REQUEST_VALUES = 2 * MAX_TEXTS_PER_JOB
#: Requests below so many bytes are parsed without their values being counted.
COUNT_FROM_BYTES = 1024 * 1024
#: What the reason of a failure may grow to.
MAX_REASON_BYTES = 1024 * 1024
#: What a result may have; the largest that workers make is token output of 64 MiB.
MAX_RESULT_BYTES = 256 * 1024 * 1024
#: What of that may be its header, safetensors' JSON.
MAX_HEADER_BYTES = 1024 * 1024

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
        return stored == data or inflate(stored, MAX_REQUEST_BYTES) == inflate(data, MAX_REQUEST_BYTES)
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
    call = _loads(inflate(data, MAX_REQUEST_BYTES))
    if not isinstance(call, list) or len(call) != 4:
        raise WireError("the job's data is not an RQ call of four parts")
    function, instance, args, kwargs = call
    if function != FUNCTION or instance is not None:
        raise WireError(f"the job asks for {_call(function, instance)}; this worker runs {FUNCTION} alone")
    if args or not isinstance(kwargs, dict):
        raise WireError("the job's arguments are not keywords")
    return check_kwargs(kwargs)


def _call(function: object, instance: object) -> str:
    return shown(function) if instance is None else f"a method of {shown(instance)}"


def check_kwargs(kwargs: Mapping[str, Any]) -> EmbedRequest:
    """The keywords of `embed` as a request. Raises WireError for a version, text or option that can't be, and
    NewerVersionError for a version that may be one some day."""
    options = dict(kwargs)
    version = options.pop("version", VERSION)
    if is_int(version, VERSION + 1, MAX_VERSION):
        raise NewerVersionError(f"the request has version {version}; this worker reads up to {VERSION}", version)
    if not is_int(version, 1, VERSION):
        raise WireError(f"the request has version {shown(version)}; this worker reads 1 to {VERSION}")
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
        "version": str(RESULT_VERSION),
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
    """Raises WireError if these are not the bytes of `encode_result`; NewerVersionError for those of a later one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    header_bytes = int.from_bytes(blob[:8], "little")
    if len(blob) > MAX_RESULT_BYTES or header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"the result in Redis is too large: {len(blob):,} bytes with a header of {header_bytes:,}")
    try:
        header = orjson.loads(blob[8 : 8 + header_bytes])
        metadata = header["__metadata__"]
        _check_result_version(metadata)
        output = metadata.get("output", _DEFAULTS["output"])
        if header[TENSOR_NAMES[output]]["dtype"] not in _DTYPES.values():
            raise ValueError("its numbers are of no type of ours")
        tensors = load(blob)
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
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as err:
        raise WireError(f"the result in Redis cannot be read: {_reason(err)}") from err
    if vectors.ndim != 2 or len(vectors) != num_rows or len(result.num_tokens) != len(result.truncated):
        raise WireError("the result in Redis is at odds with itself: rows and token counts differ")
    if not _has_plain_fields(result):
        raise WireError("the result in Redis cannot be read: a field of it is of another type")
    return result


def _check_result_version(metadata: Mapping[str, str]) -> None:
    version = int(metadata["version"])
    if RESULT_VERSION < version <= MAX_VERSION:
        raise NewerVersionError(
            f"the result has version {version}, this client reads up to {RESULT_VERSION}: update embedq here", version
        )


def _has_plain_fields(result: Embeddings) -> bool:
    """Whether what came as JSON is what it should be: counts, switches, seconds."""
    times = [getattr(result.timings, name) for name in _TIMINGS]
    return (
        all(is_int(number, 0, MAX_RESULT_BYTES) for number in result.num_tokens)
        and all(isinstance(cut, bool) for cut in result.truncated)
        and all(isinstance(seconds, (int, float)) for seconds in times)
    )


def _reason(err: Exception) -> str:
    """On one line, and short: of foreign bytes an error may quote a lot."""
    return " ".join(str(err).split())[:200]


def is_result(blob: bytes) -> bool:
    return blob[4:9] == _SAFETENSORS_MARK


def encode_exc_string(failure: JobFailedError) -> bytes:
    """What RQ's result stream holds for a failed job: the error as the last line of a traceback."""
    line = f"{JobFailedError.__module__}.{JobFailedError.__name__}: {failure}"
    return base64.b64encode(zlib.compress(line.encode(errors="backslashreplace"), 1))


def decode_exc_string(field: bytes) -> JobFailedError:
    """The failure in a result stream's `exc_string`, whichever worker wrote it. Raises WireError."""
    if len(field) > 2 * MAX_REASON_BYTES:
        raise WireError(f"the failure in Redis is too large: {len(field):,} bytes")
    try:
        packed = base64.b64decode(field, validate=True)
    except binascii.Error as err:
        raise WireError("the failure in Redis is not base64") from err
    return JobFailedError.parse(inflate(packed, MAX_REASON_BYTES).decode(errors="replace"))


def inflate(data: bytes, max_bytes: int) -> bytes:
    """With a bound, so that a small field cannot become gigabytes; bytes that aren't zlib stay. Raises WireError."""
    if data[:1] == b"[" and len(data) <= max_bytes:
        return data  # JSON; zlib's first byte is another, and trying would cost more than all the rest
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, max_bytes)
    except zlib.error:
        if len(data) > max_bytes:
            raise WireError(f"the data has {len(data):,} bytes; at most {max_bytes:,} go") from None
        return data
    if inflater.unconsumed_tail:
        raise WireError(f"the data inflates to more than {max_bytes:,} bytes")
    if not inflater.eof:
        raise WireError("the data is cut short")
    return plain


def _loads(plain: bytes) -> Any:
    if len(plain) >= COUNT_FROM_BYTES:
        _check_contents(plain)
    try:
        return orjson.loads(plain)
    except orjson.JSONDecodeError as err:
        raise WireError(f"the job's data is not JSON: {_reason(err)}") from err


def _check_contents(plain: bytes) -> None:
    """Raises WireError for what would take many times its bytes once it is parsed."""
    # Of an escape of two or six bytes one is a character: more than so many are there for certain.
    num_chars = len(plain.translate(None, _CONTINUATIONS)) - plain.count(b"\\") - 4 * plain.count(b"\\u")
    if num_chars > MAX_JOB_CHARS + COUNT_FROM_BYTES:
        raise WireError(f"the job's data has {num_chars:,} characters; at most {MAX_JOB_CHARS:,} of texts go")
    if _holds_many_values(plain):
        raise WireError(f"the job's data holds more than {MAX_REQUEST_VALUES:,} values; no request of ours does")


#: The bytes of UTF-8 that begin no character.
_CONTINUATIONS = bytes(range(0x80, 0xC0))
#: A JSON string. Possessive, as one that went back would need memory for each character.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def _holds_many_values(plain: bytes) -> bool:
    """Counts what separates values and opens lists, outside of strings; and looks no further than it must."""
    num_values = end_before = 0
    for num_strings, string in enumerate(_STRING.finditer(plain)):
        num_values += _count_marks(plain, end_before, string.start())
        end_before = string.end()
        if max(num_values, num_strings) > MAX_REQUEST_VALUES:
            return True
    return num_values + _count_marks(plain, end_before, len(plain)) > MAX_REQUEST_VALUES


def _count_marks(plain: bytes, start: int, end: int) -> int:
    return sum([plain.count(mark, start, end) for mark in (b",", b"[", b"{")])
