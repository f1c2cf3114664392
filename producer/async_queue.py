"""The client for one event loop: `EmbedQueue`'s surface, awaited.

Knows how the steps are done without blocking; what is asked of Redis is in `calls`, what goes onto the queue in
`requests`, waiting in `async_results`. Needs no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, Unpack

import redis
import redis.asyncio

from embedq.producer import calls, requests, scripts
from embedq.producer.async_results import AsyncResultReader
from embedq.producer.calls import Result
from embedq.producer.connection import DEFAULT_URL, check_client, connect_async, describe, translate
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import ConfigurationError, EmbedqError
from embedq.producer.jobs import AsyncEmbedJob
from embedq.producer.options import EmbedOptions, check_job_id
from embedq.producer.outcomes import Outcome
from embedq.producer.queue import DEFAULT_QUEUE, check_queue_name
from embedq.producer.settings import EnqueueKeywords, JobSettings, split_keywords
from embedq.producer.status import JobStatus

#: Connections that all calls of one queue share; waiting for results takes two more, however many wait.
MAX_CONNECTIONS = 16


class AsyncEmbedQueue:
    """One queue of one Redis. All tasks of one event loop may share it, thousands at a time.

    async with AsyncEmbedQueue("redis://localhost:6379/0", queue="embed") as q:
        job = await q.enqueue("a text")
        (await job.result(timeout=30)).vectors     # (1, d) float32

    Every method does what `EmbedQueue`'s of that name does. A call that is canceled changes nothing more; only `embed`
    cancels its jobs. `connection` is a `redis.asyncio.Redis` whose pool allows three connections at least.

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
        if url is not None and connection is not None:
            raise ConfigurationError("give a url or a connection, not both")
        self.name = check_queue_name(queue)
        self._defaults: EnqueueKeywords = {"max_depth": max_depth, "block_timeout": block_timeout}
        split_keywords(self._defaults)
        self._owns_connection = connection is None
        self._client = connect_async(url or DEFAULT_URL) if connection is None else check_client(connection)
        self._redis: Any = self._client
        prelude = scripts.source(__package__, "common")
        self._scripts = {name: scripts.load(self._client, __package__, name, prelude) for name in calls.SCRIPTS}
        self._free_connections = asyncio.Semaphore(MAX_CONNECTIONS)
        self._reader = AsyncResultReader(self._client)

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
        **keywords: Unpack[EnqueueKeywords],
    ) -> list[AsyncEmbedJob]:
        """See `EmbedQueue.enqueue_many`."""
        options, settings = self._split(keywords)
        made = requests.one_a_text(self.name, texts, job_ids, options, settings)
        await self._run(calls.enqueue_in_chunks(self.name, made, settings))
        return [AsyncEmbedJob(request.job_id, self) for request in made]

    # --- following jobs

    async def job(self, job_id: str) -> AsyncEmbedJob:
        """See `EmbedQueue.job`."""
        await self.status(job_id)
        return AsyncEmbedJob(job_id, self)

    async def status(self, job_id: str) -> JobStatus:
        """See `EmbedQueue.status`."""
        return await self._run(calls.status(job_id))

    async def statuses(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """See `EmbedQueue.statuses`."""
        return await self._run(calls.statuses(job_ids))

    async def result(self, job_id: str, timeout: float | None = 30) -> Embeddings:
        """See `EmbedQueue.result`."""
        [(_, outcome)] = [found async for found in self._outcomes([check_job_id(job_id)], timeout)]
        if isinstance(outcome, EmbedqError):
            raise outcome
        return outcome

    async def results(self, job_ids: Iterable[str], timeout: float | None = 30) -> dict[str, Outcome]:
        """See `EmbedQueue.results`."""
        ids = [check_job_id(job_id) for job_id in job_ids]
        found = {job_id: outcome async for job_id, outcome in self._outcomes(ids, timeout)}
        return {job_id: found[job_id] for job_id in ids}

    # --- changing jobs

    async def cancel(self, job_id: str) -> bool:
        """See `EmbedQueue.cancel`."""
        return await self._run(calls.cancel(job_id))

    async def requeue(self, job_id: str, *, at_front: bool = False) -> None:
        """See `EmbedQueue.requeue`."""
        await self._run(calls.requeue(job_id, at_front=at_front))

    async def depth(self) -> int:
        """See `EmbedQueue.depth`."""
        return await self._run(calls.depth(self.name))

    async def close(self) -> None:
        """Closes the connections, unless they were the caller's. Who still waits for a result raises
        QueueConnectionError.
        """
        await self._reader.close()
        if self._owns_connection:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # --- the steps

    def _split(self, keywords: EnqueueKeywords) -> tuple[EmbedOptions, JobSettings]:
        return split_keywords({**self._defaults, **keywords})

    async def _enqueue(
        self,
        texts: str | Sequence[str],
        job_id: str | None,
        keywords: EnqueueKeywords,
        start: calls.Start = calls.NOW,
    ) -> AsyncEmbedJob:
        options, settings = self._split(keywords)
        request = requests.one(self.name, texts, job_id, options, settings)
        await self._run(calls.enqueue(self.name, [request], settings, start))
        return AsyncEmbedJob(request.job_id, self)

    async def _run(self, operation: calls.Operation[Result]) -> Result:
        """Does an operation's steps, one after the other."""
        try:
            step = next(operation)
            while True:
                try:
                    reply = await self._do(step)
                except EmbedqError as err:
                    step = operation.throw(err)
                else:
                    step = operation.send(reply)
        except StopIteration as end:
            result: Result = end.value
            return result

    async def _do(self, step: calls.Step) -> Any:
        if isinstance(step, calls.Pause):
            return await asyncio.sleep(step.seconds)
        try:
            async with self._free_connections:
                if isinstance(step, calls.ScriptCall):
                    return await self._scripts[step.script](keys=step.keys, args=step.args)
                pipeline = self._redis.pipeline(transaction=step.is_transaction)
                for command in step.commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute()
        except redis.RedisError as err:
            raise translate(err, describe(self._client)) from err

    def _outcomes(self, job_ids: list[str], timeout: float | None) -> AsyncIterator[tuple[str, Outcome]]:
        return self._reader.outcomes(job_ids, timeout)
