"""Where the jobs of a queue are: what both clients ask of one Redis (here) or of several (`sharded_place`).

Every method is an operation, steps for whoever has connections (see `calls`).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from embedq.producer import calls, groups, keys
from embedq.producer.calls import NOW, Commands, Operation, Start
from embedq.producer.errors import EmbedqError, PartialEnqueueError
from embedq.producer.outcomes import not_found
from embedq.producer.requests import Request
from embedq.producer.settings import JobSettings
from embedq.producer.status import JobStatus


class Enqueued(NamedTuple):
    #: as they were put on the queue, in the order in which they were given
    jobs: list[Request]
    #: ids that were there before
    known: frozenset[str]


class Place(ABC):
    """Ids that have no job get JobNotFoundError from what is asked of one, None from what is asked of many."""

    def __init__(self, queue: str) -> None:
        self.queue = queue

    @abstractmethod
    def enqueue(
        self, jobs: Sequence[Request], settings: JobSettings, start: Start = NOW, *, may_rename: bool = False
    ) -> Operation[Enqueued]:
        """In calls of a thousand. `may_rename`: nobody knows the ids yet, so that others do as well.

        Raises DuplicateJobError, QueueFull, JobNotFoundError (a dependency), and PartialEnqueueError where some of
        the jobs got through.
        """

    def enqueue_own(self, jobs: Sequence[Request], settings: JobSettings) -> Operation[Enqueued]:
        """For a caller that cancels all of these jobs after an error, so that it need not say how many got through."""
        try:
            return (yield from self.enqueue(jobs, settings, may_rename=not settings.dedupe))
        except PartialEnqueueError as err:
            raise err.__cause__ or err from None

    @abstractmethod
    def statuses(self, job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]: ...

    def status(self, job_id: str) -> Operation[JobStatus]:
        found = yield from self.statuses([job_id])
        return _found(job_id, found[job_id])

    @abstractmethod
    def cancel_all(self, job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
        """The status in which each job was found."""

    def cancel(self, job_id: str) -> Operation[bool]:
        """Whether the job had not ended before."""
        found = yield from self.cancel_all([job_id])
        return not _found(job_id, found[job_id]).is_terminal

    def give_up(self, job_ids: Iterable[str]) -> Operation[None]:
        """Cancels in passing: the error under way matters more than one from here; what stays expires by itself."""
        with contextlib.suppress(EmbedqError):
            yield from self.cancel_all(job_ids)

    @abstractmethod
    def requeue(self, job_id: str, *, at_front: bool) -> Operation[None]:
        """Raises JobStateError unless the job failed or was canceled."""

    @abstractmethod
    def forget(self, job_ids: Sequence[str]) -> Operation[None]:
        """Deletes finished jobs that nobody else can know."""

    @abstractmethod
    def depth(self) -> Operation[int]: ...

    @abstractmethod
    def group_ids(self, name: str) -> Operation[list[str]]:
        """In no order."""

    @abstractmethod
    def group_counts(self, name: str) -> Operation[dict[JobStatus, int]]:
        """Jobs by status; those that have expired don't count."""

    @abstractmethod
    def cancel_group(self, name: str) -> Operation[int]:
        """How many of its jobs had not ended."""

    @abstractmethod
    def kept(self, names: Sequence[str]) -> Operation[list[bytes | None]]:
        """Entries of the vector cache by the hashes that they go by."""

    @abstractmethod
    def keep(self, entries: Mapping[str, bytes], ttl_s: int) -> Operation[None]:
        """Writes entries of the vector cache, by their hashes."""


class OneRedis(Place):
    """All of a queue on one server."""

    def enqueue(
        self,
        jobs: Sequence[Request],
        settings: JobSettings,
        start: Start = NOW,
        *,
        may_rename: bool = False,  # noqa: ARG002  (one id does as well as another)
    ) -> Operation[Enqueued]:
        known = yield from calls.enqueue_in_chunks(self.queue, jobs, settings, start)
        return Enqueued(list(jobs), known)

    def statuses(self, job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
        return calls.statuses(job_ids)

    def cancel_all(self, job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
        return calls.cancel_all(job_ids)

    def requeue(self, job_id: str, *, at_front: bool) -> Operation[None]:
        return calls.requeue(job_id, at_front=at_front)

    def forget(self, job_ids: Sequence[str]) -> Operation[None]:
        return calls.forget(self.queue, job_ids)

    def depth(self) -> Operation[int]:
        return calls.depth(self.queue)

    def group_ids(self, name: str) -> Operation[list[str]]:
        return groups.job_ids(name)

    def group_counts(self, name: str) -> Operation[dict[JobStatus, int]]:
        return groups.counts(name)

    def cancel_group(self, name: str) -> Operation[int]:
        return groups.cancel(name)

    def kept(self, names: Sequence[str]) -> Operation[list[bytes | None]]:
        [values] = yield Commands([("MGET", *map(keys.vector, names))])
        return list(values)

    def keep(self, entries: Mapping[str, bytes], ttl_s: int) -> Operation[None]:
        yield Commands([("SET", keys.vector(name), value, "EX", ttl_s) for name, value in entries.items()])


def _found(job_id: str, found: JobStatus | None) -> JobStatus:
    if found is None:
        raise not_found(job_id)
    return found
