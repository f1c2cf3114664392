"""Throws damaged bytes at all that reads bytes out of Redis: a clear error or a value, in bounded time and memory.

`python -m tests.fuzz --bytes 10000000 --seed 1` is the long way; `tests/queue/test_fuzz.py` goes a short one. A seed
makes the same inputs again. No coverage guides it: the readers are small, and the seeds are real ones.
"""

from __future__ import annotations

import base64
import random
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from embedq.producer import (
    Embeddings,
    EmbedOptions,
    EmbedSerializer,
    JobFailedError,
    WireError,
    fleet,
    keys,
    outcomes,
    wire,
)
from embedq.worker.claims import _read_claim
from embedq.worker.foreign_jobs import FIELDS, ForeignJob

#: Seconds for which one input may be at work.
LIMIT_S = 10
#: Bytes that an input grows to at most by duplication.
MAX_INPUT_BYTES = 20_000
#: What numbers and names are replaced by.
TOKENS = (
    *(b"0", b"-1", b"1e999", b"9" * 30, b"null", b"true", b'""', b"[]", b"{}", b"[[", b"NaN", b'"\\ud800"', b"\xff"),
    *(b'"texts"', b'"__metadata__"', b'"dtype":"F64"', b'"BF16"', b'"data_offsets":[0,99999999999]', b"\0\0\0\0{"),
    *(
        b"[code=x retryable=yes text_index=%s]" % (b"9" * 5000),
        b"os.getpid",
        b"\x80\x04\x95",
        b"nan",
        b"2026-01-01T00:00:00Z",
    ),
)


class FuzzError(AssertionError):
    """A reader did what it must not do; the message holds what makes it do so again."""


@dataclass(frozen=True)
class Target:
    """One reader, with inputs that it reads."""

    name: str
    read: Callable[[bytes], object]
    seeds: list[bytes]
    #: what it may raise
    errors: tuple[type[Exception], ...] = (WireError,)
    #: what is done to an input once it is damaged
    wrap: Callable[[bytes], bytes] = field(default=lambda blob: blob)


class _NoRedis:
    """For RQ's `Job`, which wants a connection but needs none to read a hash."""


def _read_hash(blob: bytes) -> object:
    """A job's hash: each line a value, in the order of RQ's fields."""
    values = blob.split(b"\n")
    fields = dict(zip((b"data", *map(str.encode, FIELDS)), values, strict=False))
    job = ForeignJob("id", connection=_NoRedis(), serializer=EmbedSerializer)  # type: ignore[arg-type]
    job.restore(fields)
    return job.to_dict()


def _read_claimed(blob: bytes) -> object:
    values = (blob.split(b"\n") + 5 * [b""])[:5]
    return _read_claim([b"embed", values[1], b"e", values[3], values[4]], 1e9)


def _read_worker(blob: bytes) -> object:
    counts = ("successful_job_count", "failed_job_count")
    names = ("state", "queues", "hostname", "pid", *counts, "last_heartbeat", "embedq_figures")
    fields = dict(zip(map(str.encode, names), blob.split(b"\n"), strict=False))
    return fleet._read_worker(keys.worker("w").encode(), fields, 1e9)


def _read_entry(blob: bytes) -> object:
    """An entry of a result stream: whatever it is, it is an outcome."""
    kind, _, rest = blob.partition(b"\n")
    found = outcomes.entry_outcome("id", {b"type": kind, b"return_value": rest, b"exc_string": rest})
    outcomes.read_status(kind)
    if not isinstance(found, (Embeddings, Exception)):
        raise FuzzError(f"an entry became {found!r}")
    return str(found)


def _results() -> list[bytes]:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    plain = Embeddings(vectors=vectors, num_tokens=(3, 4, 5), truncated=(False, True, False), model="noop:4")
    tokens = Embeddings(
        vectors=np.ones((5, 2), np.float16), num_tokens=(3, 2), truncated=(False, False), model="m", output="tokens"
    )
    return [wire.encode_result(plain), wire.encode_result(tokens)]


def _requests() -> list[bytes]:
    options = (EmbedOptions(), EmbedOptions(dimensions=3, prompt="p: ", precision="int8"), EmbedOptions(chunk=True))
    plain = [wire.plain_request(["a text", '\u00fc \U0001f600 \\ "x"'], each) for each in options]
    return [*plain, *(zlib.compress(each) for each in plain)]


def targets() -> list[Target]:
    results, requests = _results(), _requests()
    failure = JobFailedError("text 3 is too long", code="too_long", retryable=True, text_index=3)
    reasons = [
        base64.b64decode(wire.encode_exc_string(failure)),
        b"Traceback\n  line\nValueError: no",
        b"AbandonedJobError",
    ]
    hashes = [_hash(requests[0]), _hash(requests[-1].replace(b"\n", b" "))]
    entries = [b"1\n" + base64.b64encode(results[0]), b"2\n" + wire.encode_exc_string(failure), b"3\n", b"4\n"]
    figures = b'{"v":1,"time":1e9,"jobs":3,"texts":3,"tokens":9,"tokens_per_s":1.5,"fill":0.5,"version":"0.1.0"}'
    lines = [b"\n".join([b"idle", b"embed", b"host", b"17", b"3", b"0", b"2026-01-01T00:00:00Z", figures])]
    anything = (Exception,)
    return [
        Target("request", wire.decode_request, requests),
        Target("packed request", wire.decode_request, requests[:3], wrap=zlib.compress),
        Target("result", wire.decode_result, results),
        Target("result's header", wire.decode_result, [_header(each) for each in results], wrap=_with_header),
        Target("reason", wire.decode_exc_string, reasons, wrap=base64.b64encode),
        Target("packed reason", wire.decode_exc_string, reasons[1:], wrap=lambda b: base64.b64encode(zlib.compress(b))),
        Target("raw reason", wire.decode_exc_string, [wire.encode_exc_string(failure)]),
        Target("serializer", EmbedSerializer.loads, [*results, b'{"a": [1, "b"]}', *requests[:1]]),
        Target("result entry", _read_entry, entries, ()),
        # RQ raises what it will; whoever calls it logs that.
        Target("job hash", _read_hash, hashes, anything),
        Target("claim", _read_claimed, [b"embed\nid\ne\ndata\n2026-01-01T00:00:00.000000Z"], ()),
        Target("worker hash", _read_worker, lines, ()),
    ]


def _hash(data: bytes) -> bytes:
    """A good one, as `_read_hash` takes it."""
    known = {"status": b"queued", "meta": b'{"a": 1}', "dependency_ids": b'["a"]', "retry_intervals": b"[1, 2]"}
    numbers = ("timeout", "ttl", "retries_left", "repeats_left", "allow_dependency_failures", "enqueue_at_front")
    fields = dict.fromkeys(FIELDS, b"") | dict.fromkeys(numbers, b"1") | known | {"repeat_intervals": b"[60]"}
    times = ("created_at", "enqueued_at", "started_at")
    fields |= dict.fromkeys(times, b"2026-01-01T00:00:00.000000Z")
    # RQ reads a number wherever one of these is there at all.
    fields |= {name: b"60" for name in FIELDS if name.endswith("_timeout")}
    return b"\n".join([data, *(fields[name] for name in FIELDS)])


def _header(blob: bytes) -> bytes:
    return blob[8 : 8 + int.from_bytes(blob[:8], "little")]


def _with_header(header: bytes) -> bytes:
    """A damaged header under a right length, so that it is read."""
    return len(header).to_bytes(8, "little") + header + bytes(48)


def mutate(blob: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """One to eight changes: of bytes, of slices, of words, and of what another input has in that place."""
    damaged = bytearray(blob)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        place = chance.randrange(len(damaged) + 1)
        end = min(len(damaged), place + chance.choice((1, 2, 4, 16, 200)))
        kind = chance.randrange(8)
        if kind == 0 and place < len(damaged):
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            damaged[place:end] = chance.randbytes(end - place)
        elif kind == 2:
            del damaged[place:end]
        elif kind == 3:
            damaged[place:place] = chance.choice(TOKENS)
        elif kind == 4:
            damaged[place:end] = chance.choice(TOKENS)
        elif kind == 5 and len(damaged) < MAX_INPUT_BYTES:
            damaged[place:place] = damaged[place:end] * chance.choice((1, 2, 50))
        elif kind == 6:
            other = chance.choice(others)
            damaged[place:end] = other[place:end] if chance.random() < 0.5 else other
        else:
            del damaged[place:]
    return bytes(damaged[:MAX_INPUT_BYTES])


@contextmanager
def in_time(what: str) -> Iterator[None]:
    """Raises FuzzError in what takes longer; on the main thread alone, as all signals."""

    def raise_it(*_: Any) -> None:
        raise FuzzError(f"not done within {LIMIT_S} s: {what}")

    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(target: Target, blob: bytes) -> bool:
    """Whether it was read. Raises FuzzError for anything but a value or one of the target's errors on one line."""
    shown = f"{target.name}: {blob[:2000]!r}"
    with in_time(shown):
        try:
            target.read(blob)
        except target.errors as err:
            if isinstance(err, (MemoryError, RecursionError)):
                raise FuzzError(f"{type(err).__name__} in {shown}") from err
            if isinstance(err, WireError) and ("\n" in str(err) or len(str(err)) > 1000):
                raise FuzzError(f"{str(err)[:200]!r} is no clear line, in {shown}") from err
            return False
        except Exception as err:
            raise FuzzError(f"{type(err).__name__}: {err} in {shown}") from err
    return True


@dataclass
class Figures:
    inputs: int = 0
    bytes: int = 0
    #: inputs that were read in spite of everything
    read: int = 0


def run(num_bytes: int, seed: int) -> dict[str, Figures]:
    """At least so many bytes, the same number for each target: a tenth of it pure noise."""
    chance = random.Random(seed)
    found: dict[str, Figures] = {}
    all_targets = targets()
    for target in all_targets:
        figures = found[target.name] = Figures()
        for blob in target.seeds:
            check(target, target.wrap(blob))
        while figures.bytes * len(all_targets) < num_bytes:
            noise = chance.randbytes(chance.randrange(1, 300))
            plain = noise if chance.random() < 0.1 else mutate(chance.choice(target.seeds), chance, target.seeds)
            blob = target.wrap(plain)
            figures.read += check(target, blob)
            figures.inputs += 1
            figures.bytes += len(blob)
    return found


def as_json(found: dict[str, Figures]) -> bytes:
    return orjson.dumps(found, option=orjson.OPT_INDENT_2)
