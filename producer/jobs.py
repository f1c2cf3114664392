"""A handle on one job: its id and the queue that it was put on. Holds no state of the job's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedq.producer.embeddings import Embeddings
from embedq.producer.status import JobStatus

if TYPE_CHECKING:
    from embedq.producer.queue import EmbedQueue


class EmbedJob:
    """One job by its id; every call asks Redis anew."""

    __slots__ = ("_queue", "id")

    def __init__(self, job_id: str, queue: EmbedQueue) -> None:
        self.id = job_id
        self._queue = queue

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

    def __repr__(self) -> str:
        return f"EmbedJob({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EmbedJob) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)
