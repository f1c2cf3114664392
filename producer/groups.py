"""A group: jobs that were enqueued under one name, in RQ's own keys, so that RQ's `Group` knows them too.

The first half is steps without I/O, as in `calls`; the handles below do them through their queue.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from embedq.producer import calls, keys
from embedq.producer.calls import Commands, Operation
from embedq.producer.options import is_job_id
from embedq.producer.outcomes import Outcome
from embedq.producer.settings import check_group
from embedq.producer.status import JobStatus

if TYPE_CHECKING:
    from embedq.producer.async_queue import AsyncEmbedQueue
    from embedq.producer.queue import EmbedQueue

#: Ids read in one round trip, about.
PAGE_IDS = 1000


def page(name: str, cursor: int) -> Operation[tuple[int, list[str]]]:
    """Some of a group's ids, and where to go on; 0 is the beginning and, when it comes back, the end.

    An id may come twice where the group changes meanwhile.
    """
    [(cursor, members)] = yield Commands([("SSCAN", keys.group(name), cursor, "COUNT", PAGE_IDS)])
    # RQ's other jobs may be in it, too; what cannot be a job's id is none of anybody's.
    names = [member.decode(errors="replace") for member in members]
    return cursor, [name for name in names if is_job_id(name)]


def job_ids(name: str) -> Operation[list[str]]:
    """In no order."""
    found: dict[str, None] = {}
    cursor = None
    while cursor != 0:
        cursor, ids = yield from page(name, cursor or 0)
        found.update(dict.fromkeys(ids))
    return list(found)


def counts(name: str) -> Operation[dict[JobStatus, int]]:
    """Jobs by status; those that have expired don't count."""
    seen: set[str] = set()
    found: Counter[JobStatus] = Counter()
    cursor = None
    while cursor != 0:
        cursor, ids = yield from page(name, cursor or 0)
        fresh = [job_id for job_id in dict.fromkeys(ids) if job_id not in seen]
        seen.update(fresh)
        statuses = yield from calls.statuses(fresh)
        found.update(status for status in statuses.values() if status is not None)
    return dict(found)


def cancel(name: str) -> Operation[int]:
    """How many of its jobs had not ended."""
    found = yield from calls.cancel_all((yield from job_ids(name)))
    return sum(status is not None and not status.is_terminal for status in found.values())


class _Group:
    """What both handles are."""

    __slots__ = ("_queue", "name")

    def __init__(self, name: str, queue: Any) -> None:
        self.name = check_group(name)
        self._queue = queue

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class JobGroup(_Group):
    """The jobs of one name, on whichever queues; every call asks Redis anew. A name that nobody used has no jobs.

    Redis keeps the name as long as RQ does: workers drop jobs that have expired, and then the group.
    """

    __slots__ = ()
    _queue: EmbedQueue

    def job_ids(self) -> list[str]:
        """In no order; some may have expired."""
        return self._queue._run(self._queue._place.group_ids(self.name))

    def counts(self) -> dict[JobStatus, int]:
        """How many jobs have which status, read a thousand at a time; expired ones don't count."""
        return self._queue._run(self._queue._place.group_counts(self.name))

    def results(self, timeout: float | None = 30) -> dict[str, Outcome]:
        """See `EmbedQueue.results`."""
        return self._queue.results(self.job_ids(), timeout)

    def cancel(self) -> int:
        """Cancels what has not ended; how many jobs that were."""
        return self._queue._run(self._queue._place.cancel_group(self.name))


class AsyncJobGroup(_Group):
    """`JobGroup`, awaited."""

    __slots__ = ()
    _queue: AsyncEmbedQueue

    async def job_ids(self) -> list[str]:
        """See `JobGroup.job_ids`."""
        return await self._queue._run(self._queue._place.group_ids(self.name))

    async def counts(self) -> dict[JobStatus, int]:
        """See `JobGroup.counts`."""
        return await self._queue._run(self._queue._place.group_counts(self.name))

    async def results(self, timeout: float | None = 30) -> dict[str, Outcome]:
        """See `JobGroup.results`."""
        return await self._queue.results(await self.job_ids(), timeout)

    async def cancel(self) -> int:
        """See `JobGroup.cancel`."""
        return await self._queue._run(self._queue._place.cancel_group(self.name))
