"""What waits on queues: texts, bytes and the oldest job's age, from a sample that look.lua takes.

Knows the script; knows no workers and no rates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis

from embedq.producer import keys, scripts
from embedq.producer.connection import is_denied
from embedq.producer.figures import seconds_of

#: Jobs looked at on one queue; up to so many are counted exactly.
SAMPLE_JOBS = 512
#: Jobs looked at in one call for all queues, but LEAST_JOBS on each: some 10 ms of the server's time, in pieces.
SAMPLE_JOBS_OF_ALL = 8192
LEAST_JOBS = 16


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits on one queue."""

    jobs: int
    texts: int
    #: of the jobs' data, as it stands in Redis
    bytes: int
    #: of the jobs that were looked at, the queue's head among them; 0 if nothing waits or none tells its time
    oldest_age_s: float
    #: every job was looked at; else texts and bytes are estimates
    is_exact: bool


class WaitingReader:
    """Asks again and again, but once Redis has not permitted it not any more: each refusal stands in its log."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        self._script = scripts.load(client, __package__, "look")
        self._is_denied = False

    def read(self, depths: Mapping[str, int]) -> dict[str, Waiting] | None:
        """Of each queue (name: about so many jobs wait), in one round trip.

        None where Redis' user may not look at jobs. Raises redis.RedisError.
        """
        if self._is_denied:
            return None
        found = {name: Waiting(0, 0, 0, 0.0, True) for name, jobs in depths.items() if not jobs}
        busy = [name for name in depths if name not in found]
        try:
            for name, reply in zip(busy, self._ask(busy), strict=True):
                found[name] = _waiting(reply)
        except redis.ResponseError as err:
            if not is_denied(err):
                raise
            self._is_denied = True
            return None
        return found

    def _ask(self, names: list[str]) -> list[Any]:
        if not names:
            return []
        limit = max(LEAST_JOBS, min(SAMPLE_JOBS, SAMPLE_JOBS_OF_ALL // len(names)))
        for _ in range(scripts.LOADS - 1):
            with contextlib.suppress(redis.exceptions.NoScriptError):
                return self._ask_once(names, limit)
            self._redis.script_load(self._script.script)
        return self._ask_once(names, limit)

    def _ask_once(self, names: list[str], limit: int) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.evalsha(self._script.sha, 0, keys.PREFIX, name, limit)
        replies = pipeline.execute(raise_on_error=False)
        for reply in replies:
            # The script may be lost between two calls of one pipeline, too.
            if isinstance(reply, Exception):
                raise reply
        return list(replies)


def _waiting(reply: Any) -> Waiting:
    jobs, looked, _, texts, num_bytes, oldest, now = reply
    since = seconds_of(oldest.decode(errors="replace"))
    share = jobs / looked if looked else 0.0
    return Waiting(
        jobs=jobs,
        texts=round(texts * share),
        bytes=round(num_bytes * share),
        oldest_age_s=0.0 if since is None else max(0.0, float(now) - since),
        is_exact=jobs == looked,
    )
