"""Handles on jobs: an id and the queue that it was put on. They hold no state of the job's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedq.producer.embeddings import Embeddings
from embedq.producer.status import JobStatus

if TYPE_CHECKING:
    from embedq.producer.async_queue import AsyncEmbedQueue
    from embedq.producer.queue import EmbedQueue


class Handle:
    """What all handles are: equal if their ids are."""

    __slots__ = ("_queue", "id")

    def __init__(self, job_id: str, queue: Any) -> None:
        self.id = job_id
        self._queue = queue

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class EmbedJob(Handle):
    """One job by its id; every call asks Redis anew."""

    __slots__ = ()
    _queue: EmbedQueue

    def status(self) -> JobStatus:
        """Raises JobNotFoundError if it never existed or has expired."""
        return self._queue.status(self.id)

    def result(self, timeout: float | None = 30) -> Embeddings:
        """See `EmbedQueue.result`."""
        return self._queue.result(self.id, timeout=timeout)

    def cancel(self) -> bool:
        """See `EmbedQueue.cancel`."""
        return self._queue.cancel(self.id)

    def requeue(self, *, at_front: bool = False) -> None:
        """See `EmbedQueue.requeue`."""
        self._queue.requeue(self.id, at_front=at_front)


class AsyncEmbedJob(Handle):
    """The same, awaited."""

    __slots__ = ()
    _queue: AsyncEmbedQueue

    async def status(self) -> JobStatus:
        """See `EmbedJob.status`."""
        return await self._queue.status(self.id)

    async def result(self, timeout: float | None = 30) -> Embeddings:
        """See `EmbedQueue.result`."""
        return await self._queue.result(self.id, timeout=timeout)

    async def cancel(self) -> bool:
        """See `EmbedQueue.cancel`."""
        return await self._queue.cancel(self.id)

    async def requeue(self, *, at_front: bool = False) -> None:
        """See `EmbedQueue.requeue`."""
        await self._queue.requeue(self.id, at_front=at_front)
