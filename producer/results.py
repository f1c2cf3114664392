"""Waiting for results: many jobs watched at once through their result streams, without polling.

`XREAD BLOCK` wakes on the entry that a worker (or a cancellation) appends. What replies mean is in `outcomes`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis

from embedq.producer.connection import describe, is_wrong_type, translate, translated_errors
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import QueueServerError
from embedq.producer.outcomes import LOOK_AGAIN_S, Outcome, Watch, look_commands, sole_entries, timed_out

#: Jobs in one XREAD, and looked at in one round trip.
WINDOW = 128
#: Seconds for which a result is waited for before anybody looks whether the job exists.
GLANCE_S = 0.02


class ResultReader:
    """Reads outcomes of jobs; one caller at a time. Every method raises QueueConnectionError."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        timeout = client.connection_pool.connection_kwargs.get("socket_timeout")
        self._slice_s = min(LOOK_AGAIN_S, timeout / 2) if timeout else LOOK_AGAIN_S

    def outcomes(self, job_ids: Iterable[str], timeout_s: float | None) -> Iterator[tuple[str, Outcome]]:
        """Each job once, about as it ends; what has not ended in time comes last, as ResultTimeoutError.

        `timeout_s` None waits for good, 0 only looks.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        watch = Watch()
        ids = list(dict.fromkeys(job_ids))
        if timeout_s != 0 and 0 < len(ids) <= WINDOW:
            for job_id, outcome in self._glance(ids):
                ids.remove(job_id)
                yield job_id, outcome
        for start in range(0, len(ids), WINDOW):
            yield from self.look(watch, ids[start : start + WINDOW])
        while watch and (left_s := deadline - time.monotonic()) > 0:
            yield from self.read(watch, left_s)
        if timeout_s != 0:
            # What was not in the window that was read last.
            yield from self.look(watch, watch.ids())
        yield from ((job_id, timed_out(job_id, timeout_s)) for job_id in watch.ids())

    def read(self, watch: Watch, block_s: float) -> list[tuple[str, Outcome]]:
        """What has ended, waited for up to `block_s`, but no longer than a socket may be silent; 0 only looks.

        It waits for the first WINDOW jobs; when they are silent the others have their turn.
        """
        slice_s = min(block_s, self._slice_s)
        news = self._read_first(watch, slice_s)
        if news or slice_s < self._slice_s:
            return news
        news = self.look(watch, watch.ids()[:WINDOW])
        for _ in range(len(watch) // WINDOW):
            if news:
                break
            watch.rotate(WINDOW)
            news = self._read_first(watch, 0)
        return news

    def look(self, watch: Watch, job_ids: Sequence[str]) -> list[tuple[str, Outcome]]:
        """Those of the jobs that have ended; the others are watched. One whose key is of another type fails alone."""
        outcomes: list[tuple[str, Outcome]] = []
        for start in range(0, len(job_ids), WINDOW):
            some = job_ids[start : start + WINDOW]
            with translated_errors(self._redis):
                pipeline = self._redis.pipeline(transaction=True)
                for command in look_commands(some):
                    pipeline.execute_command(*command)
                replies = pipeline.execute(raise_on_error=False)
                outcomes.extend(watch.looked(some, list(map(self._unless_of_another_type, replies))))
        return outcomes

    def _unless_of_another_type(self, reply: Any) -> Any:
        """The reply; the error in our words where a key of another type stands. Raises redis-py's other errors."""
        if not isinstance(reply, redis.RedisError):
            return reply
        if is_wrong_type(reply):
            return translate(reply, describe(self._redis))
        raise reply

    def _glance(self, job_ids: Sequence[str]) -> list[tuple[str, Outcome]]:
        """Results that are there already or come in a moment: most of those that are asked for right after enqueueing.

        In one round trip instead of a look's and a read's. A failure may be one before a requeue, which a look tells.
        """
        watch = Watch()
        watch.add_fresh(job_ids)
        found = self._read_first(watch, GLANCE_S, only_if_sole=True)
        return [news for news in found if isinstance(news[1], Embeddings)]

    def _read_first(self, watch: Watch, block_s: float, *, only_if_sole: bool = False) -> list[tuple[str, Outcome]]:
        """One entry of each stream, the oldest that was not seen; `only_if_sole`: none of streams that have more."""
        block_ms = max(1, int(block_s * 1000)) if block_s else None
        try:
            with translated_errors(self._redis):
                # Without a count each stream would come whole, which may hold anything.
                reply = self._redis.xread(watch.streams(WINDOW), block=block_ms, count=2 if only_if_sole else 1)
        except QueueServerError as err:
            if isinstance(err.__cause__, redis.RedisError) and is_wrong_type(err.__cause__):
                return self.look(watch, watch.ids()[:WINDOW])
            raise
        return list(watch.news(sole_entries(reply) if only_if_sole else reply))
