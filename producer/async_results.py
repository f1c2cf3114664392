"""Waiting for results in one event loop: any number of calls share one blocking read and one look at statuses.

A job that a call waits for is looked at first, together with those of other calls. If it has not ended it joins the
watch: one `XREAD BLOCK` over all result streams, called off when a job joins. What replies mean is in `outcomes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice

import redis
import redis.asyncio

from embedq.producer import keys
from embedq.producer.connection import BACKOFF, RETRIES, closed, describe, is_passing, translate
from embedq.producer.errors import EmbedqError, QueueConnectionError
from embedq.producer.looks import look
from embedq.producer.mailbox import Mailbox, Verdict
from embedq.producer.outcomes import (
    BEFORE_ALL,
    LOOK_AGAIN_S,
    RETRIED,
    Outcome,
    entry_outcome,
    timed_out,
)
from embedq.producer.result_streams import ResultStreams, bulk
from embedq.producer.tasks import stop

#: Streams in one read: more hold the server up for more than 10 ms. The others have their turn in the next.
READ_WINDOW = 8192
#: Seconds that a read blocks at most, and while there are more streams than fit.
BLOCK_S = 5.0
TURN_S = 1.0
#: Seconds between the starts of two reads, per stream: a read of n streams costs the server 1.1 n us.
PACE_S = 1e-5
#: Jobs in one look, and looked at again per LOOK_AGAIN_S: those whose last look is the longest ago.
LOOK_JOBS = 256


class _Watch:
    """One job that has not ended, and the calls that wait for it."""

    __slots__ = ("_key", "_last", "calls", "job_id", "looked_at_s")

    def __init__(self, job_id: str, key: bytes) -> None:
        self.job_id = job_id
        self.calls: set[Mailbox] = set()
        self.looked_at_s = 0.0
        self._key = bulk(key)
        self.see(BEFORE_ALL)

    def see(self, entry_id: bytes) -> None:
        """The entry up to which the stream tells nothing new."""
        self._last = bulk(entry_id)

    def has_seen(self, entry_id: bytes) -> bool:
        return self._last == bulk(entry_id)

    @property
    def position(self) -> tuple[bytes, bytes]:
        return self._key, self._last


class AsyncReader(ABC):
    """Lets any number of calls of one event loop know what becomes of jobs."""

    def mailbox(self) -> Mailbox:
        """For a call that is to be told."""
        return Mailbox()

    @abstractmethod
    def subscribe(self, call: Mailbox, job_ids: Iterable[str], *, are_fresh: bool = False) -> None:
        """Lets the call know of these jobs until `unsubscribe`. `are_fresh`: they were just made, so the first look
        is left out. Raises QueueConnectionError once closed.
        """

    @abstractmethod
    def unsubscribe(self, call: Mailbox) -> None: ...

    @abstractmethod
    async def close(self) -> None:
        """Calls that still wait get QueueConnectionError."""

    async def outcomes(
        self, job_ids: Iterable[str], timeout_s: float | None
    ) -> AsyncGenerator[tuple[str, Outcome], None]:
        """Each job once, about as it ends; what has not ended in time comes last, as ResultTimeoutError.

        `timeout_s` None waits for good, 0 only looks. Raises QueueConnectionError.
        """
        async with aclosing(self.outcome_lists(job_ids, timeout_s)) as lists:
            async for some in lists:
                for each in some:
                    yield each

    async def outcome_lists(
        self, job_ids: Iterable[str], timeout_s: float | None
    ) -> AsyncGenerator[list[tuple[str, Outcome]], None]:
        """The same, those together that have ended when somebody asks."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        call = self.mailbox()
        try:
            self.subscribe(call, dict.fromkeys(job_ids))
            while not call.is_over:
                news = await call.news(deadline)
                if not news:
                    news = [(job_id, timed_out(job_id, timeout_s)) for job_id in call.waiting]
                    self.unsubscribe(call)
                yield news
        finally:
            self.unsubscribe(call)


class AsyncResultReader(AsyncReader):
    """Of one server. Its task runs while somebody waits."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._streams = ResultStreams(client)
        self._newcomers: dict[tuple[Mailbox, str], None] = {}
        self._watches: dict[bytes, _Watch] = {}
        #: Set when there is something to look at, to read.
        self._arrived = asyncio.Event()
        self._joined = asyncio.Event()
        #: Whether a watch is not part of the read under way.
        self._has_unread = False
        self._task: asyncio.Task[None] | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._is_closed = False

    # --- the calls' side

    def subscribe(self, call: Mailbox, job_ids: Iterable[str], *, are_fresh: bool = False) -> None:
        if self._is_closed:
            raise closed()
        for job_id in job_ids:
            call.waiting.add(job_id)
            if are_fresh:
                self._join(call, job_id, BEFORE_ALL)
            else:
                call.unlooked.add(job_id)
                self._newcomers[call, job_id] = None
            self._arrived.set()
        if call.waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="embedq results")

    def unsubscribe(self, call: Mailbox) -> None:
        for job_id in call.waiting:
            self._newcomers.pop((call, job_id), None)
            watch = self._watches.get(_stream_key(job_id))
            if watch is not None:
                watch.calls.discard(call)
                if not watch.calls:
                    del self._watches[_stream_key(job_id)]
        call.forget_all()

    async def close(self) -> None:
        """Ends the task."""
        self._is_closed = True
        if self._task is not None:
            await stop([self._task, *self._loops])
        self._fail(closed)

    # --- the task's side

    async def _run(self) -> None:
        """Serves until nobody waits. What breaks is told to all who wait."""
        while self._newcomers or self._watches:
            try:
                await self._serve()
            except Exception as err:
                self._fail(partial(self._failure, err))

    async def _serve(self) -> None:
        self._loops = [asyncio.create_task(self._look_on()), asyncio.create_task(self._read_on())]
        try:
            await asyncio.wait(self._loops, return_when=asyncio.FIRST_COMPLETED)
        finally:
            try:
                await stop(self._loops)
            finally:
                await self._streams.release()
        for loop in self._loops:
            if not loop.cancelled():
                loop.result()

    async def _look_on(self) -> None:
        """Looks at newcomers at once and at some of the watched every LOOK_AGAIN_S, until nobody waits."""
        look_again_at = time.monotonic() + LOOK_AGAIN_S
        while self._newcomers or self._watches:
            if not self._newcomers:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(look_again_at - time.monotonic()):
                        await self._arrived.wait()
            self._arrived.clear()
            await self._look_at_newcomers()
            if self._has_unread:
                await self._streams.call_off()
            if time.monotonic() >= look_again_at:
                look_again_at = time.monotonic() + LOOK_AGAIN_S
                oldest = heapq.nsmallest(LOOK_JOBS, self._watches.values(), key=lambda watch: watch.looked_at_s)
                await self._look_again(oldest)

    async def _look_at_newcomers(self) -> None:
        batch = list(islice(self._newcomers, LOOK_JOBS))
        found = await look(self._client, [job_id for _, job_id in batch])
        for call, job_id in batch:
            # Calls that were canceled meanwhile are no longer there.
            if (call, job_id) in self._newcomers:
                del self._newcomers[call, job_id]
                verdict, last = found[job_id]
                if verdict is None:
                    self._join(call, job_id, last)
                call.tell(job_id, verdict)

    async def _look_again(self, watches: Sequence[_Watch]) -> bool:
        """Settles what ended without an entry in its stream. Whether it found any."""
        found = await look(self._client, [watch.job_id for watch in watches])
        for watch in watches:
            watch.looked_at_s = time.monotonic()
            verdict, _ = found[watch.job_id]
            if verdict is not None:
                self._settle(watch, verdict)
        return any(verdict for verdict, _ in found.values())

    async def _read_on(self) -> None:
        """Reads what is watched, at a pace that leaves the server to others however much that is.

        A connection that breaks is made anew, as often as redis-py sends a command.
        """
        failures = 0
        while True:
            if not self._watches:
                self._joined.clear()
                await self._joined.wait()
            next_at = time.monotonic() + PACE_S * min(READ_WINDOW, len(self._watches))
            try:
                await self._read()
                failures = 0
            except redis.RedisError as err:
                failures += 1
                if failures > RETRIES or not is_passing(err):
                    raise
                next_at = time.monotonic() + BACKOFF.compute(failures)
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    async def _read(self) -> None:
        window = dict(islice(self._watches.items(), READ_WINDOW))
        is_all = len(window) == len(self._watches)
        self._has_unread = False
        positions = [watch.position for watch in window.values()]
        try:
            news = await self._streams.read(positions, BLOCK_S if is_all else TURN_S)
        except redis.ResponseError as err:
            if is_passing(err) or not await self._drop_bad(list(window.values())):
                raise
            return
        for key, entry_id, fields in news:
            self._take(window[key], entry_id, fields)
        if not is_all:
            self._to_the_end(window)

    def _take(self, watch: _Watch, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        if fields.get(b"type") == RETRIED:
            watch.see(entry_id)
        elif not watch.has_seen(entry_id):
            self._settle(watch, partial(entry_outcome, watch.job_id, fields))

    async def _drop_bad(self, watches: Sequence[_Watch]) -> bool:
        """A key that is no stream fails a whole read; its job is found by a look. Whether there was one."""
        starts = range(0, len(watches), LOOK_JOBS)
        return any([await self._look_again(watches[start : start + LOOK_JOBS]) for start in starts])

    def _to_the_end(self, window: dict[bytes, _Watch]) -> None:
        """The others' turn comes first."""
        for key, watch in window.items():
            if self._watches.get(key) is watch:
                self._watches[key] = self._watches.pop(key)

    def _join(self, call: Mailbox, job_id: str, last: bytes) -> None:
        key = _stream_key(job_id)
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = _Watch(job_id, key)
            watch.looked_at_s = time.monotonic()
            self._has_unread = True
            self._joined.set()
        watch.see(last)
        watch.calls.add(call)

    def _settle(self, watch: _Watch, verdict: Verdict) -> None:
        """Tells all who wait, unless they were told meanwhile: then the job may have another watch."""
        key = _stream_key(watch.job_id)
        if self._watches.get(key) is watch:
            del self._watches[key]
            for call in watch.calls:
                call.tell(watch.job_id, verdict)

    def _fail(self, make_error: Callable[[], EmbedqError]) -> None:
        calls = {call for call, _ in self._newcomers}.union(*(watch.calls for watch in self._watches.values()))
        self._newcomers.clear()
        self._watches.clear()
        for call in calls:
            call.fail(make_error)

    def _failure(self, cause: Exception) -> EmbedqError:
        place = describe(self._client)
        if isinstance(cause, redis.RedisError):
            error: EmbedqError = translate(cause, place)
        else:
            error = QueueConnectionError(f"reading results from Redis at {place} broke off: {cause}")
        error.__cause__ = cause
        return error


def _stream_key(job_id: str) -> bytes:
    return keys.results(job_id).encode()
