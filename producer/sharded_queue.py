"""The client of several Redis servers: `EmbedQueue`'s surface, done by an event loop in a thread of its own.

One thread waits for all shards at once, however many calls there are: see `async_sharded_queue`. Texts are taken, and
results handed out, in the caller's own thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from embedq.producer import calls
from embedq.producer.async_sharded_queue import AsyncShardedEmbedQueue
from embedq.producer.calls import News, WaitFor
from embedq.producer.client import DEFAULT_QUEUE
from embedq.producer.driver import drive
from embedq.producer.errors import QueueConnectionError
from embedq.producer.loop_thread import LoopThread
from embedq.producer.outcomes import Outcome
from embedq.producer.queue import EmbedQueue
from embedq.producer.shards import ShardUrls
from embedq.producer.streaming import StreamStep, TextEmbedding

Result = TypeVar("Result")


class ShardedEmbedQueue(EmbedQueue):
    """One queue spread over several Redis servers, each with workers of its own. Threads may share it; processes make
    their own.

    q = ShardedEmbedQueue(["redis://redis-1:6379/0", "redis://redis-2:6379/0"])
    q.enqueue("a text").result(timeout=30).vectors     # (1, d) float32

    A job's id says on which shard it is, by rendezvous hashing with the shards' names: by default where each is,
    `redis-1:6379/0`, by Sentinel `mymaster/0`; `{"a": url, "b": url}` names them, so that servers may move. Every
    client of a queue names the same shards, in whatever order. With a shard more a part of the ids that are made from
    then on is on it; jobs from before are still found, since who does not find a job on its shard asks the others.

    Every method does what `EmbedQueue`'s does, and besides:

    - A shard that is away or full costs its own jobs alone: their outcome is QueueConnectionError or QueueServerError.
      Jobs with ids of embedq's own go to the others, which may leave one behind that nobody knows if its shard goes
      just as it takes the job. With `job_id`, `dedupe`, `depends_on` or `retries=0` the error is raised; of several
      jobs, PartialEnqueueError names those that got through. `embed_stream` goes on without the shard.
    - `max_depth` is shared out: each shard takes its part, rounded up.
    - Jobs that `depends_on` ties together must be on one shard: see `id_beside`. Raises InvalidOptionError.
    """

    def __init__(
        self,
        urls: ShardUrls,
        *,
        queue: str = DEFAULT_QUEUE,
        max_depth: int | None = None,
        block_timeout: float = 0,
    ) -> None:
        """Raises ConfigurationError, InvalidOptionError."""
        self._awaited = AsyncShardedEmbedQueue(urls, queue=queue, max_depth=max_depth, block_timeout=block_timeout)
        self._begin(self._awaited._place, self._awaited._defaults)
        self._thread = LoopThread("embedq shards")

    def id_beside(self, job_id: str) -> str:
        """A fresh id of the shard that this one belongs to, for jobs that depend on each other."""
        return self._awaited.id_beside(job_id)

    def close(self) -> None:
        """Closes the connections."""
        self._thread.close(self._awaited.close)

    def _run(self, operation: calls.Operation[Result]) -> Result:
        return self._thread.run(lambda: self._awaited._run(operation))

    def _drive(
        self, operation: Generator[StreamStep, Any, Result], source: Iterator[str]
    ) -> Generator[TextEmbedding, None, Result]:
        waiting = _WaitingInThread(self._awaited, self._thread)
        try:
            return (yield from drive(operation, source, waiting.do, waiting))
        finally:
            waiting.end()

    def _outcomes(self, job_ids: list[str], timeout: float | None) -> Iterator[tuple[str, Outcome]]:
        lists = self._awaited._reader.outcome_lists(job_ids, timeout)
        try:
            while (some := self._thread.run(lambda: anext(lists, None))) is not None:
                yield from some
        finally:
            with contextlib.suppress(QueueConnectionError):  # closed meanwhile
                self._thread.run(lists.aclose)


class _WaitingInThread:
    """The jobs that one operation waits for, and its other steps, in the event loop's thread."""

    def __init__(self, awaited: AsyncShardedEmbedQueue, thread: LoopThread) -> None:
        self._awaited, self._thread = awaited, thread
        self._call = awaited._reader.mailbox()

    def do(self, step: calls.Step) -> Any:
        return self._thread.run(lambda: self._awaited._do(step, self._call))

    def wait_for(self, step: WaitFor) -> list[tuple[str, Outcome]]:
        found: list[tuple[str, Outcome]] = self.do(step)
        return found

    def news(self, step: News) -> list[tuple[str, Outcome]]:
        found: list[tuple[str, Outcome]] = self.do(News(0) if step.or_texts else step)
        return found

    def end(self) -> None:
        with contextlib.suppress(QueueConnectionError):  # closed meanwhile
            self._thread.run(self._unsubscribe)

    async def _unsubscribe(self) -> None:
        self._awaited._reader.unsubscribe(self._call)
