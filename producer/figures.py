"""What a worker tells of itself in its hash, and RQ's times: reading what anybody may have written there. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

import orjson

#: The version of the field that this reads.
VERSION = 1
#: What the field may have; ours has some 400 bytes.
MAX_FIELD_BYTES = 4096
#: Tokens that a byte of a job's data can come to; outside of it a figure is nonsense.
LEAST_TOKENS_PER_BYTE, MOST_TOKENS_PER_BYTE = 0.001, 10.0
MAX_CHARS = 64


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker's `embedq_figures`; what it left out, or what can't be, is 0 or empty."""

    #: by the worker's clock, seconds since 1970
    time: float
    #: done since it started
    jobs: int
    texts: int
    #: encoded since it started
    tokens: int
    #: while it encodes: what it is capable of; 0 as long as it has encoded nothing
    tokens_per_s: float
    #: over the last seconds, pauses included
    recent_tokens_per_s: float
    #: of a job's data, as it was learnt
    tokens_per_byte: float
    #: of a micro-batch's tokens, the share that was used, 0 to 1
    fill: float
    #: share of the last seconds in which it encoded, 0 to 1
    busy: float
    #: jobs in hand
    held: int
    prefetched_tokens: int
    #: attempts that failed since it started
    errors: int
    version: str
    #: the version of the requests that it reads
    wire: int
    dtype: str


def read_figures(field: bytes | None) -> WorkerFigures | None:
    """None where there are none that this version can read: of a stock RQ worker, another version, junk."""
    if not field or len(field) > MAX_FIELD_BYTES:
        return None
    try:
        told = orjson.loads(field)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(told, dict) or told.get("v") != VERSION:
        return None
    ratio = _number(told.get("tokens_per_byte"))
    return WorkerFigures(
        time=_number(told.get("time")),
        jobs=int(_number(told.get("jobs"))),
        texts=int(_number(told.get("texts"))),
        tokens=int(_number(told.get("tokens"))),
        tokens_per_s=_number(told.get("tokens_per_s")),
        recent_tokens_per_s=_number(told.get("recent_tokens_per_s")),
        tokens_per_byte=ratio if LEAST_TOKENS_PER_BYTE <= ratio <= MOST_TOKENS_PER_BYTE else 0.0,
        fill=min(1.0, _number(told.get("fill"))),
        busy=min(1.0, _number(told.get("busy"))),
        held=int(_number(told.get("held"))),
        prefetched_tokens=int(_number(told.get("prefetched_tokens"))),
        errors=int(_number(told.get("errors"))),
        version=_text(told.get("version")),
        wire=int(_number(told.get("wire"))),
        dtype=_text(told.get("dtype")),
    )


def seconds_of(time: str) -> float | None:
    """One of RQ's times, `2026-01-31T23:59:59.123456Z`, as seconds since 1970; None for anything else."""
    try:
        moment = datetime.fromisoformat(time)
        return None if moment.tzinfo is None else moment.timestamp()
    except (ValueError, OverflowError):
        return None


def _number(value: object) -> float:
    """Not negative and finite, else 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return 0.0
    return max(0.0, float(value))


def _text(value: object) -> str:
    return value[:MAX_CHARS] if isinstance(value, str) else ""
