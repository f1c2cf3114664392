"""What somebody who can write into Redis might put there: requests, hashes and keys that no client of ours writes.

A seed makes the same ones again. `ForeignParty.push` plants one job; none of them may run anything, stop a worker or
harm another job.
"""

from __future__ import annotations

import base64
import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from embedq.producer import EmbedOptions, keys, wire

#: Fields of RQ's job hash and of ours.
JOB_FIELDS = (
    *("data", "status", "origin", "description", "created_at", "enqueued_at", "started_at", "ended_at"),
    *("last_heartbeat", "worker_name", "timeout", "result_ttl", "failure_ttl", "ttl", "meta", "result", "exc_info"),
    *("success_callback_name", "success_callback_timeout", "failure_callback_name", "failure_callback_timeout"),
    *("stopped_callback_name", "stopped_callback_timeout", "webhooks", "dependency_id", "dependency_ids"),
    *("allow_dependency_failures", "enqueue_at_front", "number_of_retries", "retries_left", "retry_intervals"),
    *("enqueue_at_front_on_retry", "repeats_left", "repeat_intervals", "rate_limit_key", "rate_limit_concurrency"),
    *("group_id", "embedq_texts", "embedq_retries", "embedq_change", "embedq_attempts"),
)
#: Numbers, dates and names as nobody would write them.
NONSENSE = (
    *(b"", b"nan", b"-nan", b"inf", b"-inf", b"1e400", b"-1", b"0x7fffffffffffffff", b"9" * 400, b"1.5", b"abc"),
    *(b"\xff\xfe", b"\x00", b"[", b"{}", b"[[]]", b'["x"]', b"null", b"true", b"[1e999]", b"[" * 5000, b"a\nb: c"),
    *(b"2026-13-45T99:99:99Z", b"os.getpid", b"builtins.eval", b"x" * 100_000),
)
WEIRD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**63, 1e308, 0.5, "", "text", "x" * 100_000, [], {}, [None], [[]], [["a"]], {"a": 1}),
    *("__import__('os').getpid()", ["a", 1], ["a", None], ["a", ["b"]], {"texts": ["a"]}, [[[[[[[[[[]]]]]]]]]]),
)
FUNCTIONS = (
    *("os.getpid", "os.system", "builtins.eval", "builtins.exec", "subprocess.run", "pickle.loads", "lambda: 1"),
    *("embedq.worker.tasks.embed.__globals__", "embedq.worker.tasks", "embedq.worker.tasks._engine", "embed", ""),
    *("embedq.worker.tasks.embed ", "embedq.worker.worker.EmbedWorker", "embedq.worker.tasks.EMBED", "x.y" * 1000),
)


class Canary:
    """Whoever unpickles one makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self._file), "w")


def planted_pickles(file: Path) -> list[bytes]:
    """A pickle in each of the clothes in which RQ's fields come."""
    plain = pickle.dumps(Canary(file))
    return [plain, zlib.compress(plain), base64.b64encode(plain), base64.b64encode(zlib.compress(plain))]


@cache
def bombs() -> tuple[bytes, ...]:
    """Small fields that inflate to a hundred megabytes: of blanks, of lists, of what could be texts, of one name."""
    head = b'["%s",null,[],' % wire.FUNCTION.encode()
    size = 100_000_000
    return tuple(
        zlib.compress(plain, 9)
        for plain in (
            b" " * (wire.MAX_REQUEST_BYTES + 1),
            head + b'{"texts":[' + b"[]," * (size // 3) + b"1]}]",
            head + b'{"texts":[' + b'"ab",' * (size // 5) + b'"a"]}]',
            head + b'{"texts":["' + b"a" * size + b'"]}]',
            head + b'{"texts":["a"],"' + b"a" * size + b'":1}]',
            head + b'{"texts":["a"],"dimensions":' + b"[" * size + b"]" * size + b"}]",
            b'["' + b"a" * size + b'",null,[],{}]',
        )
    )


def calls(chance: random.Random) -> Iterator[Any]:
    """RQ calls in which one place is not what it should be, for ever."""
    options = [*EmbedOptions.__dataclass_fields__, "texts", "version", "evil", "x" * 1000, "__class__", "self"]
    while True:
        call: list[Any] = [wire.FUNCTION, None, [], {"texts": ["a"]}]
        place = chance.randrange(5)
        if place == 0:
            call[0] = chance.choice([*FUNCTIONS, *WEIRD_VALUES])
        elif place == 1:
            call[1] = chance.choice([value for value in WEIRD_VALUES if value is not None])
        elif place == 2:
            call[2] = chance.choice([["a"], {"a": 1}, "a", 1, [None]])
        elif place == 3:
            call[3] = chance.choice([value for value in WEIRD_VALUES if value != {"texts": ["a"]}])
        else:
            call[3][chance.choice(options[-5:])] = chance.choice(WEIRD_VALUES)
        yield call


def odd_json(chance: random.Random) -> bytes:
    """What JSON says is none, or what Python has no room for."""
    head = b'["%s",null,[],{"texts":' % wire.FUNCTION.encode()
    inner = chance.choice(
        (b'["\\ud800"]', b"[NaN]", b"[Infinity]", b"[1e999]", b'["a"', b'["\xff"]', b"[" * 900 + b"]" * 900, b"{,}")
    )
    return head + inner + chance.choice((b"}]", b"", b"}]]]", b',"dimensions":' + b"9" * 5000 + b"}]", b"\x00"))


def damaged(chance: random.Random) -> bytes:
    """A good request with some of its bytes changed, or cut short."""
    plain = wire.encode_request(["a text " * chance.randrange(1, 80)], EmbedOptions(dimensions=3))
    if chance.random() < 0.3:
        return plain[: chance.randrange(1, len(plain))]
    blob = bytearray(plain)
    # In the middle, where a change cannot make another good request.
    for place in range(4, 9):
        blob[place] ^= chance.randrange(1, 256)
    return bytes(blob)


def odd_ids(chance: random.Random) -> bytes:
    return chance.choice(
        (b"\xff\xfe", b"a:b", b"a\nb", b"\n", b":", b"*", b"../../x", b"a b", b"\x00", b"{tag}", b"x" * 50_000, b"%s%n")
    ) + b"%d" % chance.randrange(10**9)


class ForeignParty:
    """Plants hostile jobs on one queue."""

    def __init__(self, redis: Any, queue: str, seed: int, file: Path) -> None:
        self._redis = redis
        self._queue = queue
        self._chance = random.Random(seed)
        self._pickles = planted_pickles(file)
        self._calls = calls(self._chance)
        self._kinds: list[Callable[[bytes], None]] = [
            *(self._random_bytes, self._wrong_call, self._wrong_call, self._odd_json, self._damaged, self._pickled),
            *(self._nonsense_field, self._nonsense_field, self._no_data, self._other_type, self._many_fields),
            *(self._odd_id, self._records_of_other_types, self._leased_to_nobody, self._sequel),
        ]

    def push(self) -> None:
        job_id = b"hostile-%d" % self._chance.randrange(10**12)
        self._chance.choice(self._kinds)(job_id)

    def push_bombs(self) -> None:
        for number, bomb in enumerate(bombs()):
            self._put(b"bomb-%d" % number, data=bomb)

    def _put(self, job_id: bytes, **fields: Any) -> None:
        self._redis.hset(keys.JOB_PREFIX.encode() + job_id, mapping={"status": "queued", "data": "x", **fields})
        self._wait(job_id)

    def _wait(self, job_id: bytes) -> None:
        self._redis.rpush(keys.queue(self._queue), job_id)

    def _random_bytes(self, job_id: bytes) -> None:
        self._put(job_id, data=self._chance.randbytes(self._chance.randrange(1, 2000)))

    def _wrong_call(self, job_id: bytes) -> None:
        plain = orjson.dumps(next(self._calls))
        self._put(job_id, data=zlib.compress(plain) if self._chance.random() < 0.5 else plain)

    def _odd_json(self, job_id: bytes) -> None:
        self._put(job_id, data=odd_json(self._chance))

    def _damaged(self, job_id: bytes) -> None:
        self._put(job_id, data=damaged(self._chance))

    def _pickled(self, job_id: bytes) -> None:
        self._put(job_id, **{field: self._chance.choice(self._pickles) for field in JOB_FIELDS if field != "status"})

    def _nonsense_field(self, job_id: bytes) -> None:
        field = self._chance.choice(JOB_FIELDS)
        self._put(job_id, **{field: self._chance.choice(NONSENSE)})

    def _no_data(self, job_id: bytes) -> None:
        self._redis.hset(keys.JOB_PREFIX.encode() + job_id, "status", "queued")
        self._wait(job_id)

    def _other_type(self, job_id: bytes) -> None:
        self._redis.rpush(keys.JOB_PREFIX.encode() + job_id, "a list")
        self._wait(job_id)

    def _many_fields(self, job_id: bytes) -> None:
        self._put(job_id, **{f"field {number}": "x" for number in range(10_000)})

    def _odd_id(self, _: bytes) -> None:
        self._put(odd_ids(self._chance))

    def _records_of_other_types(self, job_id: bytes) -> None:
        name = job_id.decode()
        for key in (keys.results(name), keys.executions(name), keys.dependents(name), keys.dependencies(name)):
            if self._chance.random() < 0.7:
                self._redis.set(key, "a string")
        self._put(job_id)

    def _leased_to_nobody(self, job_id: bytes) -> None:
        """In the started registry, as if a worker had died with it."""
        pair = self._chance.choice((job_id, job_id + b":", b":" + job_id, job_id + b":a:b", job_id + b":\xff\n"))
        self._redis.zadd(keys.started(self._queue), {pair: 1})
        self._redis.rpush(f"{keys.PREFIX}:execution:".encode() + pair, "a list")
        self._put(job_id, status=self._chance.choice(("started", "queued")), worker_name=b"\xff:executions")

    def _sequel(self, job_id: bytes) -> None:
        """With something to be done after its end, which RQ does: RQ reads the whole hash."""
        self._redis.sadd(keys.dependents(job_id.decode()), b"\xff", "nobody", "a:b", job_id)
        nonsense = {self._chance.choice(JOB_FIELDS): self._chance.choice(NONSENSE) for _ in range(3)}
        self._put(
            job_id, **{"repeats_left": "2", "rate_limit_key": "\n", "success_callback_name": "os.getpid", **nonsense}
        )
