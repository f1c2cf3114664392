"""Jobs onto their queues that wait elsewhere: scheduled ones when their time comes (retries after an interval,
`enqueue_at`, repetitions), and those that an older worker left because it could not read them.

Every worker does it for its own queues, so that no RQ scheduler need run; beside one it does no harm. Knows the script.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import redis
from rq.rate_limit import RateLimitRegistry

from embedq.producer import keys, scripts, wire
from embedq.worker.sequels import errors_logged

logger = logging.getLogger("embedq.worker")

#: Jobs moved in one call of the script, and calls of one round: the rest waits for the next round.
PROMOTE_JOBS, CALLS_PER_ROUND = 500, 20


@dataclass(frozen=True, slots=True)
class Promoted:
    """What one call of promote.lua did."""

    #: jobs moved
    moved: int
    #: seconds until the next one is due, on any of the queues; -1: none is scheduled
    next_due_s: float
    #: entries dropped: their jobs vanished, were canceled, or are somewhere else already
    struck_off: int


class Promoter:
    """The scheduled jobs of some queues. Its methods raise redis-py's errors; each may be called again."""

    def __init__(self, client: redis.Redis, queues: Sequence[str]) -> None:
        self._client = client
        self._queues = list(queues)
        self._keys = [keys.QUEUES, keys.RATE_LIMITS, *map(keys.scheduled, queues)]
        self._promote = scripts.load(client, __package__, "promote")

    def round(self) -> int:
        """Moves all that is due, within a bound; returns how many. One script call where nothing is."""
        moved = 0
        for _ in range(CALLS_PER_ROUND):
            promoted = self.promote()
            moved += promoted.moved
            if promoted.moved + promoted.struck_off < PROMOTE_JOBS:
                break
        if moved:
            logger.debug("%d jobs that were scheduled or parked are queued now", moved)
        return moved

    def promote(self) -> Promoted:
        """At most PROMOTE_JOBS of those that are due, in the order of the queues."""
        moved, wait_ms, struck_off, *rate_limits = self._promote(
            keys=self._keys, args=[keys.PREFIX, PROMOTE_JOBS, wire.VERSION, *self._queues]
        )
        for rate_limit in rate_limits:
            # RQ's maintenance does it, too, should this worker die here.
            with errors_logged("what waits under a rate limit"):
                registry = RateLimitRegistry(rate_limit.decode(), self._client)
                registry.acquire_and_enqueue(registry.concurrency)
        return Promoted(moved, wait_ms / 1000 if wait_ms >= 0 else -1.0, struck_off)
