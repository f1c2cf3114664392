"""A queue spread over several Redis servers: what is asked of which, and what their replies come to together.

Each job is on the shard that its id names (see `rendezvous`). Pure, as `calls`: whoever has the connections does one
operation a shard at once. An id whose own shard does not know it was perhaps enqueued before there were so many: then
the others are asked, the most likely first.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from embedq.producer import calls, groups, requests
from embedq.producer.calls import CHUNK_STATUSES, NOW, Fork, Operation, Start
from embedq.producer.errors import (
    EmbedqError,
    InvalidOptionError,
    JobNotFoundError,
    PartialEnqueueError,
    QueueConnectionError,
    QueueFull,
    QueueServerError,
)
from embedq.producer.outcomes import not_found
from embedq.producer.places import Enqueued, OneRedis, Place
from embedq.producer.rendezvous import Rendezvous
from embedq.producer.requests import Request
from embedq.producer.settings import JobSettings, job_ids_of
from embedq.producer.status import JobStatus

Result = TypeVar("Result")

#: Seconds for which a shard that could not be used gets no jobs with ids of our own.
AVOIDED_S = 30.0


class _Sent(NamedTuple):
    #: ids
    accepted: set[str]
    known: set[str]
    #: by shard
    failed: dict[str, EmbedqError]


class ShardedPlace(Place):
    """Raises what `OneRedis` does; QueueConnectionError if a shard that has to be asked cannot be reached."""

    def __init__(self, queue: str, shards: Rendezvous) -> None:
        super().__init__(queue)
        self._shards = shards
        self._one = OneRedis(queue)
        #: by shard that could not be used
        self._avoided_until: dict[str, float] = {}

    # --- putting jobs on the queue

    def enqueue(
        self, jobs: Sequence[Request], settings: JobSettings, start: Start = NOW, *, may_rename: bool = False
    ) -> Operation[Enqueued]:
        """As on one server, all shards at once; `max_depth` is shared out among them.

        What a shard cannot take because it is away or full of memory goes to the others, under ids that are theirs,
        where ids may be renamed, nothing is depended on and a job may run twice (it has retries). Raises
        InvalidOptionError for dependencies on different shards, or on another one than the job.
        """
        sending = yield from self._placed(jobs, settings, may_rename=may_rename)
        # What failed may have got through all the same: without retries a job is not to run twice.
        may_move = may_rename and not settings.depends_on and settings.retries > 0
        known: set[str] = set()
        accepted: set[str] = set()
        gone: set[str] = set()
        while left := [job for job in sending if job.job_id not in accepted]:
            sent = yield from self._send(left, settings, start)
            known |= sent.known
            accepted |= sent.accepted
            gone.update(sent.failed)
            if sent.failed and not (self._is_passing(sent.failed) and may_move and len(gone) < len(self._shards.names)):
                raise _joined(sent.failed, sending, accepted)
            avoided = self._avoided(gone)
            sending = [job if job.job_id in accepted else self._elsewhere(job, avoided) for job in sending]
        return Enqueued(sending, frozenset(known))

    def _send(self, jobs: Sequence[Request], settings: JobSettings, start: Start) -> Operation[_Sent]:
        """Each job to its shard, all shards at once."""
        parts = self._shards.split(jobs, key=lambda job: job.job_id)
        shared = self._share(settings)
        replies = yield Fork(
            {shard: calls.enqueue_in_chunks(self.queue, part, shared, start) for shard, part in parts.items()}
        )
        sent = _Sent(set(), set(), {})
        for shard, reply in replies.items():
            if isinstance(reply, EmbedqError):
                sent.failed[shard] = reply
                sent.accepted.update(reply.job_ids if isinstance(reply, PartialEnqueueError) else ())
            else:
                sent.known.update(reply)
                sent.accepted.update(job.job_id for job in parts[shard])
        return sent

    def enqueue_own(self, jobs: Sequence[Request], settings: JobSettings) -> Operation[Enqueued]:
        """As on one server. Jobs that got through are canceled here, as their ids may be new to the caller."""
        try:
            return (yield from self.enqueue(jobs, settings, may_rename=not settings.dedupe))
        except PartialEnqueueError as err:
            if not settings.dedupe:
                yield from self.give_up(err.job_ids)
            raise err.__cause__ or err from None

    def id_on(self, shard: str) -> str:
        """A fresh id that belongs to this shard."""
        while True:
            for job_id in requests.fresh_ids(len(self._shards.names)):
                if self._shards.home(job_id) == shard:
                    return job_id

    def id_beside(self, job_id: str) -> str:
        """A fresh id that belongs to the same shard as this one."""
        return self.id_on(self._shards.home(job_id))

    def _placed(self, jobs: Sequence[Request], settings: JobSettings, *, may_rename: bool) -> Operation[list[Request]]:
        """The jobs, with ids where theirs may not or had better not belong to the shard that they do."""
        if settings.depends_on:
            shard = yield from self._shard_of_all(settings.depends_on)
            return [self._moved(job, shard, may_rename=may_rename) for job in jobs]
        if may_rename and (avoided := self._avoided()):
            return [self._elsewhere(job, avoided) for job in jobs]
        return list(jobs)

    def _moved(self, job: Request, shard: str, *, may_rename: bool) -> Request:
        home = self._shards.home(job.job_id)
        if home == shard:
            return job
        if may_rename:
            return job._replace(job_id=self.id_on(shard))
        raise InvalidOptionError(
            f"job {job.job_id} belongs to shard {home}, and what it depends on is on {shard}; leave the id to embedq,"
            " or take one from id_beside"
        )

    def _shard_of_all(self, job_ids: Sequence[str]) -> Operation[str]:
        """Where these jobs are. Raises InvalidOptionError if that is more than one shard, JobNotFoundError."""
        found = yield from self._search(job_ids, calls.statuses)
        for job_id in job_ids:
            if job_id not in found:
                raise calls.missing(job_id)
        homes = {shard: job_id for job_id, (shard, _) in found.items()}
        if len(homes) > 1:
            (one, first), (other, second), *_ = sorted(homes.items())
            raise InvalidOptionError(
                f"depends_on names jobs of different shards: {first} is on {one}, {second} on {other}; jobs that"
                " belong together take their ids from id_beside"
            )
        return next(iter(homes))

    def _share(self, settings: JobSettings) -> JobSettings:
        """Each shard takes its part of `max_depth`, rounded up."""
        if settings.max_depth is None:
            return settings
        return dataclasses.replace(settings, max_depth=-(-settings.max_depth // len(self._shards.names)))

    def _is_passing(self, failed: Mapping[str, EmbedqError]) -> bool:
        """Whether all of these shards cannot be used for the moment, which is noted."""
        for shard, err in failed.items():
            cause = err.__cause__ if isinstance(err, PartialEnqueueError) else err
            if not isinstance(cause, (QueueConnectionError, QueueServerError)) or not cause.retryable:
                return False
            self._avoided_until[shard] = time.monotonic() + AVOIDED_S
        return True

    def _avoided(self, gone: Collection[str] = ()) -> set[str]:
        """Shards that get no jobs which others may take: those that are gone, and those that were not long ago, unless
        these are all.
        """
        now = time.monotonic()
        avoided = {shard for shard, until in self._avoided_until.items() if until > now}.union(gone)
        return avoided if len(avoided) < len(self._shards.names) else set(gone)

    def _elsewhere(self, job: Request, avoided: Collection[str]) -> Request:
        """The job under an id of another shard if its own is avoided."""
        job_id = job.job_id
        while self._shards.home(job_id) in avoided:
            [job_id] = requests.fresh_ids(1)
        return job if job_id == job.job_id else job._replace(job_id=job_id)

    # --- following and changing jobs

    def statuses(self, job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
        waiting = iter(job_ids_of(job_ids))
        found: dict[str, JobStatus | None] = {}
        while chunk := list(islice(waiting, CHUNK_STATUSES)):
            found |= yield from self._first_found(chunk, calls.statuses)
        return found

    def cancel_all(self, job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
        return self._first_found(list(job_ids_of(job_ids)), calls.cancel_all)

    def requeue(self, job_id: str, *, at_front: bool) -> Operation[None]:
        [job_id] = job_ids_of(job_id)
        for shard in self._shards.ranked(job_id):
            reply = (yield Fork({shard: calls.requeue(job_id, at_front=at_front)}))[shard]
            if not isinstance(reply, JobNotFoundError):
                _unless_error(reply)
                return
        raise not_found(job_id)

    def forget(self, job_ids: Sequence[str]) -> Operation[None]:
        """What cannot be deleted expires by itself."""
        parts = self._shards.split(job_ids, key=str)
        yield Fork({shard: self._one.forget(part) for shard, part in parts.items()})

    def depth(self) -> Operation[int]:
        depths = yield from self._everywhere(self._one.depth)
        return sum(depths)

    # --- groups: each shard has some of their jobs

    def group_ids(self, name: str) -> Operation[list[str]]:
        found = yield from self._everywhere(lambda: groups.job_ids(name))
        return list(dict.fromkeys(job_id for ids in found for job_id in ids))

    def group_counts(self, name: str) -> Operation[dict[JobStatus, int]]:
        counts: Counter[JobStatus] = Counter()
        for found in (yield from self._everywhere(lambda: groups.counts(name))):
            counts.update(found)
        return dict(counts)

    def cancel_group(self, name: str) -> Operation[int]:
        return sum((yield from self._everywhere(lambda: groups.cancel(name))))

    # --- the vector cache: by the hash of the content

    def kept(self, names: Sequence[str]) -> Operation[list[bytes | None]]:
        """A shard that is away keeps nothing: its texts are embedded once more."""
        parts = self._shards.split(names, key=str)
        replies = yield Fork({shard: self._one.kept(part) for shard, part in parts.items()})
        found: dict[str, bytes | None] = {}
        for shard, reply in replies.items():
            if not isinstance(reply, EmbedqError):
                found.update(zip(parts[shard], reply, strict=True))
        return [found.get(name) for name in names]

    def keep(self, entries: Mapping[str, bytes], ttl_s: int) -> Operation[None]:
        parts = self._shards.split(entries, key=str)
        yield Fork(
            {shard: self._one.keep({name: entries[name] for name in part}, ttl_s) for shard, part in parts.items()}
        )

    # --- the steps

    def _first_found(
        self, job_ids: Sequence[str], ask: Callable[[list[str]], Operation[dict[str, JobStatus | None]]]
    ) -> Operation[dict[str, JobStatus | None]]:
        found = yield from self._search(job_ids, ask)
        return {job_id: found[job_id][1] if job_id in found else None for job_id in job_ids}

    def _search(
        self, job_ids: Sequence[str], ask: Callable[[list[str]], Operation[dict[str, JobStatus | None]]]
    ) -> Operation[dict[str, tuple[str, JobStatus]]]:
        """Asks the ids' own shards, for those that are not there the next ones, and so on. Each id's shard and what
        it answered, first one first.
        """
        found: dict[str, tuple[str, JobStatus]] = {}
        left = self._shards.split(job_ids, key=str)
        for rank in range(1, len(self._shards.names) + 1):
            replies = yield Fork({shard: ask(ids) for shard, ids in left.items()})
            for shard, reply in replies.items():
                answers = _unless_error(reply).items()
                found.update((job_id, (shard, status)) for job_id, status in answers if status is not None)
            missing = [job_id for ids in left.values() for job_id in ids if job_id not in found]
            if not missing or rank == len(self._shards.names):
                break
            left = {}
            for job_id in missing:
                left.setdefault(self._shards.ranked(job_id)[rank], []).append(job_id)
        return found

    def _everywhere(self, make: Callable[[], Operation[Result]]) -> Operation[list[Result]]:
        replies = yield Fork({shard: make() for shard in self._shards.names})
        return [_unless_error(reply) for reply in replies.values()]


def _joined(failed: Mapping[str, EmbedqError], jobs: Sequence[Request], accepted: Collection[str]) -> EmbedqError:
    """What is raised when these shards failed: the first one's error if nothing was enqueued."""
    shard, first = next(iter(failed.items()))
    cause: BaseException = first.__cause__ or first if isinstance(first, PartialEnqueueError) else first
    if isinstance(cause, QueueFull):
        cause = QueueFull(f"shard {shard}: {cause}")
    if not accepted and isinstance(cause, EmbedqError):
        return cause
    message = f"{len(accepted):,} of {len({job.job_id for job in jobs}):,} jobs are enqueued; then: {cause}"
    is_retryable = all(each.retryable for each in failed.values())
    err = PartialEnqueueError.of(message, [job.job_id for job in jobs], accepted, retryable=is_retryable)
    err.__cause__ = cause
    return err


def _unless_error(reply: Result | EmbedqError) -> Result:
    if isinstance(reply, EmbedqError):
        raise reply
    return reply
