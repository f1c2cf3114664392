"""The client for one event loop: `EmbedQueue`'s surface, awaited.

Knows how the steps are done without blocking; what is asked of Redis is in `calls`, what goes onto the queue in
`requests`, waiting in `async_results`. Needs no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, Unpack

import redis
import redis.asyncio

from embedq.producer import calls, embedding, requests
from embedq.producer.async_results import AsyncReader, AsyncResultReader
from embedq.producer.calls import News, Result, WaitFor
from embedq.producer.client import DEFAULT_QUEUE, QueueClient
from embedq.producer.connection import connect_async, translated_errors
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import EmbedqError, InvalidTextError
from embedq.producer.groups import AsyncJobGroup
from embedq.producer.jobs import AsyncEmbedJob
from embedq.producer.mailbox import Mailbox
from embedq.producer.options import check_job_id
from embedq.producer.outcomes import Outcome
from embedq.producer.round_trips import RoundTrips
from embedq.producer.settings import EnqueueKeywords, job_ids_of
from embedq.producer.status import JobStatus
from embedq.producer.streaming import (
    SILENCE_S,
    WINDOW_TEXTS,
    HandOut,
    OnError,
    StreamStep,
    Take,
    TextEmbedding,
    open_stream,
)
from embedq.producer.text_source import TextSource, text_source


class AsyncEmbedQueue(QueueClient[redis.asyncio.Redis]):
    """One queue of one Redis. All tasks of one event loop may share it, thousands at a time.

    async with AsyncEmbedQueue("redis://localhost:6379/0", queue="embed") as q:
        job = await q.enqueue("a text")
        (await job.result(timeout=30)).vectors     # (1, d) float32

    Every method does what `EmbedQueue`'s of that name does. A call that is canceled leaves its jobs as they are; only
    `embed` and `embed_stream` cancel theirs. All calls share a few connections, and one of them waits for all results.
    `connection` is a `redis.asyncio.Redis` whose pool allows six at least.

    Raises ConfigurationError at once for a URL that cannot be read, InvalidOptionError for a limit that is none; every
    call may raise QueueConnectionError.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queue: str = DEFAULT_QUEUE,
        connection: redis.asyncio.Redis | None = None,
        max_depth: int | None = None,
        block_timeout: float = 0,
    ) -> None:
        defaults: EnqueueKeywords = {"max_depth": max_depth, "block_timeout": block_timeout}
        super().__init__(url, queue, connection, connect_async, defaults)
        self._round_trips = RoundTrips(self._client)
        self._reader: AsyncReader = AsyncResultReader(self._client)

    # --- putting texts on the queue

    async def enqueue(
        self, texts: str | Sequence[str], *, job_id: str | None = None, **keywords: Unpack[EnqueueKeywords]
    ) -> AsyncEmbedJob:
        """See `EmbedQueue.enqueue`."""
        return await self._enqueue(texts, job_id, keywords)

    async def enqueue_at(
        self,
        moment: datetime,
        texts: str | Sequence[str],
        *,
        job_id: str | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> AsyncEmbedJob:
        """See `EmbedQueue.enqueue_at`."""
        return await self._enqueue(texts, job_id, keywords, calls.start_at(moment))

    async def enqueue_in(
        self,
        delay: float | timedelta,
        texts: str | Sequence[str],
        *,
        job_id: str | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> AsyncEmbedJob:
        """See `EmbedQueue.enqueue_in`."""
        return await self._enqueue(texts, job_id, keywords, calls.start_in(delay))

    async def enqueue_many(
        self,
        texts: Iterable[str],
        *,
        job_ids: Iterable[str] | None = None,
        delay: float | timedelta = 0,
        **keywords: Unpack[EnqueueKeywords],
    ) -> list[AsyncEmbedJob]:
        """See `EmbedQueue.enqueue_many`."""
        options, settings = self._split(keywords)
        made = requests.one_a_text(self.name, texts, job_ids, options, settings)
        may_rename = job_ids is None and not settings.dedupe
        made, _ = await self._run(self._place.enqueue(made, settings, calls.start_in(delay), may_rename=may_rename))
        return [AsyncEmbedJob(request.job_id, self) for request in made]

    async def embed(
        self,
        texts: str | Iterable[str],
        *,
        timeout: float | None = 60,
        cache_ttl: int | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> Embeddings:
        """See `EmbedQueue.embed`."""
        options, settings = self._split({"result_ttl": embedding.EMBED_RESULT_TTL_S, **keywords})
        return await self._run(embedding.embed(self._place, texts, options, settings, timeout, cache_ttl))

    def embed_stream(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        window: int = WINDOW_TEXTS,
        ordered: bool = True,
        texts_per_job: int | None = None,
        timeout: float | None = SILENCE_S,
        on_error: OnError = "raise",
        cache_ttl: int | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> AsyncGenerator[TextEmbedding, None]:
        """See `EmbedQueue.embed_stream`; to be read by `async for`.

        Of an async iterable, texts that trickle are sent on as they come. Who leaves the loop early does well to
        `aclose()` the stream (`contextlib.aclosing`): it cancels what still waits.
        """
        if isinstance(texts, str):
            raise InvalidTextError("embed_stream takes any number of texts; embed takes one")
        stream = open_stream(
            self._place,
            keywords,
            defaults=self._defaults,
            window=window,
            ordered=ordered,
            texts_per_job=texts_per_job,
            on_error=on_error,
            cache_ttl=cache_ttl,
        )
        return self._stream(stream.run(timeout), text_source(texts))

    # --- following jobs

    async def job(self, job_id: str) -> AsyncEmbedJob:
        """See `EmbedQueue.job`."""
        await self.status(job_id)
        return AsyncEmbedJob(job_id, self)

    async def status(self, job_id: str) -> JobStatus:
        """See `EmbedQueue.status`."""
        return await self._run(self._place.status(job_id))

    async def statuses(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """See `EmbedQueue.statuses`."""
        return await self._run(self._place.statuses(job_ids))

    async def result(self, job_id: str, timeout: float | None = 30) -> Embeddings:
        """See `EmbedQueue.result`."""
        [(_, outcome)] = [found async for found in self._outcomes([check_job_id(job_id)], timeout)]
        if isinstance(outcome, EmbedqError):
            raise outcome
        return outcome

    async def results(self, job_ids: Iterable[str], timeout: float | None = 30) -> dict[str, Outcome]:
        """See `EmbedQueue.results`."""
        ids = list(job_ids_of(job_ids))
        found = {job_id: outcome async for job_id, outcome in self._outcomes(ids, timeout)}
        return {job_id: found[job_id] for job_id in ids}

    def as_completed(
        self, jobs: Iterable[str | AsyncEmbedJob], timeout: float | None = 30
    ) -> AsyncIterator[tuple[AsyncEmbedJob, Outcome]]:
        """See `EmbedQueue.as_completed`; to be read by `async for`."""
        return self._as_completed(list(job_ids_of(jobs)), timeout)

    def group(self, name: str) -> AsyncJobGroup:
        """See `EmbedQueue.group`."""
        return AsyncJobGroup(name, self)

    # --- changing jobs

    async def cancel(self, job_id: str) -> bool:
        """See `EmbedQueue.cancel`."""
        return await self._run(self._place.cancel(job_id))

    async def requeue(self, job_id: str, *, at_front: bool = False) -> None:
        """See `EmbedQueue.requeue`."""
        await self._run(self._place.requeue(job_id, at_front=at_front))

    async def depth(self) -> int:
        """See `EmbedQueue.depth`."""
        return await self._run(self._place.depth())

    async def close(self) -> None:
        """Closes the connections, unless they were the caller's. Who still waits raises QueueConnectionError."""
        await self._reader.close()
        await self._round_trips.close()
        if self._owns_connection:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # --- the steps

    async def _enqueue(
        self,
        texts: str | Sequence[str],
        job_id: str | None,
        keywords: EnqueueKeywords,
        start: calls.Start = calls.NOW,
    ) -> AsyncEmbedJob:
        request, settings = self._request(texts, job_id, keywords)
        may_rename = job_id is None and not settings.dedupe
        jobs, _ = await self._run(self._place.enqueue([request], settings, start, may_rename=may_rename))
        return AsyncEmbedJob(jobs[0].job_id, self)

    async def _run(self, operation: calls.Operation[Result]) -> Result:
        """Does an operation's steps, one after the other; what a step ends in is thrown in."""
        call = self._reader.mailbox()
        try:
            step = next(operation)
            while True:
                try:
                    reply = await self._do(step, call)
                except (Exception, asyncio.CancelledError) as err:
                    step = operation.throw(err)
                else:
                    step = operation.send(reply)
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            self._reader.unsubscribe(call)

    async def _stream(
        self, operation: Generator[StreamStep, Any, None], source: TextSource
    ) -> AsyncGenerator[TextEmbedding, None]:
        """The same, and hands out items."""
        call = self._reader.mailbox()
        try:
            step = next(operation)
            while True:
                reply: Any = None
                try:
                    if isinstance(step, HandOut):
                        yield step.item
                    elif isinstance(step, Take):
                        reply = await source.take(step.count, may_wait=step.may_wait)
                    elif isinstance(step, News) and step.or_texts:
                        reply = await source.news_or_texts(call, step.timeout_s)
                    else:
                        reply = await self._do(step, call)
                except BaseException as err:
                    step = operation.throw(err)
                else:
                    step = operation.send(reply)
        except StopIteration:
            return
        finally:
            self._reader.unsubscribe(call)
            await source.close()

    async def _do(self, step: calls.Step, call: Mailbox) -> Any:
        if isinstance(step, calls.Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, News):
            return await call.news(None if step.timeout_s is None else time.monotonic() + step.timeout_s)
        if isinstance(step, WaitFor):
            self._reader.subscribe(call, step.fresh, are_fresh=True)
            self._reader.subscribe(call, step.known)
            return []
        if isinstance(step, calls.Fork):
            raise AssertionError("only several servers are asked at once")
        with translated_errors(self._client):
            if isinstance(step, calls.ScriptCall):
                return await self._round_trips.run(self._scripts[step.script], step.keys, step.args)
            return await self._round_trips.ask(step.commands)

    def _outcomes(self, job_ids: list[str], timeout: float | None) -> AsyncGenerator[tuple[str, Outcome], None]:
        return self._reader.outcomes(job_ids, timeout)

    async def _as_completed(
        self, job_ids: list[str], timeout: float | None
    ) -> AsyncIterator[tuple[AsyncEmbedJob, Outcome]]:
        async with aclosing(self._outcomes(job_ids, timeout)) as outcomes:
            async for job_id, outcome in outcomes:
                yield AsyncEmbedJob(job_id, self), outcome
