"""Waiting for results: many jobs watched at once through their result streams, without polling.

`XREAD BLOCK` wakes on the entry that a worker (or a cancellation) appends. What replies mean is in `outcomes`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis

from embedq.producer.connection import translated_errors
from embedq.producer.outcomes import LOOK_AGAIN_S, Outcome, Watch, look_commands, timed_out

#: Jobs watched in one XREAD; the others wait for their turn.
WINDOW = 128
#: Streams in one XREAD for jobs of which many end at a time.
STREAMS = 512


class ResultReader:
    """Reads outcomes of jobs; one caller at a time."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        timeout = client.connection_pool.connection_kwargs.get("socket_timeout")
        self._slice_s = min(LOOK_AGAIN_S, timeout / 2) if timeout else LOOK_AGAIN_S

    def outcomes(self, job_ids: Iterable[str], timeout_s: float | None) -> Iterator[tuple[str, Outcome]]:
        """Each job once, about as it ends: WINDOW of them are watched at a time, in the given order.

        What has not ended in time comes as ResultTimeoutError.

        `timeout_s` None waits for good, 0 only looks. Raises QueueConnectionError.
        """
        waiting = deque(dict.fromkeys(job_ids))
        watch = Watch()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while waiting or watch:
            fresh = [waiting.popleft() for _ in range(min(WINDOW - len(watch), len(waiting)))]
            yield from self._look(fresh, watch)
            if not watch:
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                for job_id in watch.ids():
                    watch.drop(job_id)
                    yield job_id, timed_out(job_id, timeout_s)
                continue
            news = self._block(watch, self._slice_s if left is None else min(left, self._slice_s))
            yield from news
            if not news:
                yield from self._look(watch.ids(), watch)

    def read(self, watch: Watch, block_s: float) -> list[tuple[str, Outcome]]:
        """What has ended, waited for up to `block_s`, but no longer than a socket may be silent; 0 only looks.

        Of more than STREAMS jobs those watched the longest are waited for, and after a silence all are looked at.
        """
        slice_s = min(block_s, self._slice_s)
        with translated_errors(self._redis):
            reply = self._redis.xread(watch.streams(STREAMS), block=max(1, int(slice_s * 1000)) if block_s else None)
        news = list(watch.news(reply))
        if not news and slice_s == self._slice_s:
            return self.look(watch, watch.ids())
        return news

    def look(self, watch: Watch, job_ids: Sequence[str]) -> list[tuple[str, Outcome]]:
        """Those of the jobs that have ended; the others are watched."""
        outcomes: list[tuple[str, Outcome]] = []
        for start in range(0, len(job_ids), WINDOW):
            outcomes.extend(self._look(list(job_ids[start : start + WINDOW]), watch))
        return outcomes

    def _look(self, job_ids: list[str], watch: Watch) -> Iterator[tuple[str, Outcome]]:
        """Yields the jobs that have ended; the others are watched."""
        if not job_ids:
            return
        with translated_errors(self._redis):
            pipeline = self._redis.pipeline(transaction=True)
            for command in look_commands(job_ids):
                pipeline.execute_command(*command)
            replies = pipeline.execute()
        yield from watch.looked(job_ids, replies)

    def _block(self, watch: Watch, block_s: float) -> list[tuple[str, Outcome]]:
        """Outcomes of the jobs that ended within `block_s`."""
        with translated_errors(self._redis):
            reply = self._redis.xread(watch.streams(), block=max(1, int(block_s * 1000)))
        return list(watch.news(reply))
