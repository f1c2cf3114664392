"""Failed jobs: finding them by why and when they failed, putting them back, deleting them.

    with connect(url) as client:
        for job in failed.find(client, Filter(codes={"out_of_memory"}, newer_than_s=3600)):
            print(job.id, job.message)

Knows RQ's registry of failed jobs; what a job's result stream says of its failure is read by `outcomes`. Every call may
raise QueueConnectionError.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis

from embedq.producer import keys, scripts
from embedq.producer.connection import is_wrong_type, translated_errors
from embedq.producer.errors import JobFailedError, JobNotFoundError, JobStateError
from embedq.producer.figures import seconds_of
from embedq.producer.options import check_job_id, is_job_id
from embedq.producer.outcomes import entry_outcome, not_found, read_status
from embedq.producer.queue import EmbedQueue
from embedq.producer.status import JobStatus

#: Jobs read in one round trip.
PAGE_JOBS = 500
#: Jobs deleted in one call.
PURGE_JOBS = 100
#: Digits of a count that can be one.
MAX_DIGITS = 9
#: What is read of a job's hash; the first are those of `FailedJob`, the others of `details`.
_FIELDS = ("status", "origin", "ended_at", "embedq_attempts", "embedq_retries", "retries_left", "embedq_texts")
_MORE_FIELDS = ("created_at", "enqueued_at", "started_at", "worker_name", "group_id", "description", "failure_ttl")
_ENDED = (JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which failed jobs are meant; what is left out does not count."""

    #: names; of all queues if empty
    queues: tuple[str, ...] = ()
    #: error codes, as in `JobFailedError.code`
    codes: frozenset[str] = frozenset()
    #: failed so many seconds ago or more, or less
    older_than_s: float | None = None
    newer_than_s: float | None = None

    def fits(self, job: FailedJob) -> bool:
        """Whether a job of these queues is meant. One that tells no time is neither older nor newer."""
        if self.codes and job.code not in self.codes:
            return False
        if self.older_than_s is not None and (job.age_s is None or job.age_s < self.older_than_s):
            return False
        return self.newer_than_s is None or (job.age_s is not None and job.age_s < self.newer_than_s)


@dataclass(frozen=True, slots=True)
class FailedJob:
    id: str
    queue: str
    #: for machines; `stopped` of a job that RQ's stop command has ended
    code: str
    #: for people
    message: str
    retryable: bool
    #: of the text at fault, where one is
    text_index: int | None
    texts: int
    attempts: int
    #: as RQ writes it, by the server's clock; empty if the job tells no time
    ended_at: str
    #: seconds since then
    age_s: float | None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find(client: redis.Redis, wanted: Filter) -> Iterator[FailedJob]:
    """Queue by queue, in each those first that are kept longest: the latest, where all are kept as long.

    Three round trips for each PAGE_JOBS. What comes out may be put back or deleted meanwhile; jobs that fail after the
    first page was read are not among them, and some may be missed that others delete.
    """
    for queue in wanted.queues or _queues(client):
        # From the end, so that what goes or comes there leaves the places of those to be read as they are.
        for end in range(_count(client, queue), 0, -PAGE_JOBS):
            yield from filter(wanted.fits, _read(client, queue, _page(client, queue, max(0, end - PAGE_JOBS), end)))


def latest(client: redis.Redis, queue: str, number: int) -> list[FailedJob]:
    """At most so many of one queue, those first that are kept longest."""
    return _read(client, queue, _page(client, queue, -number, 0))


def details(client: redis.Redis, job_id: str) -> dict[str, Any]:
    """All that is known of one failed job but its texts.

    Raises JobNotFoundError, and JobStateError if it has not failed.
    """
    [job] = fetch(client, [job_id])
    with translated_errors(client):
        connection: Any = client
        pipeline = connection.pipeline(transaction=False)
        pipeline.hmget(keys.job(job_id), *_MORE_FIELDS).hstrlen(keys.job(job_id), "data").ttl(keys.job(job_id))
        fields, num_bytes, ttl_s = pipeline.execute()
    told = {name: (value or b"").decode(errors="replace") for name, value in zip(_MORE_FIELDS, fields, strict=True)}
    return {**job.to_plain(), **told, "data_bytes": num_bytes, "expires_in_s": ttl_s if ttl_s >= 0 else None}


def fetch(client: redis.Redis, job_ids: Iterable[str]) -> list[FailedJob]:
    """These jobs. Raises InvalidJobIdError, JobNotFoundError, and JobStateError for one that has not failed."""
    ids = [check_job_id(job_id) for job_id in job_ids]
    found = {job.id: job for job in _read(client, "", ids)}
    for job_id in ids:
        if job_id not in found:
            raise _not_failed(client, job_id)
    return [found[job_id] for job_id in ids]


def requeue(client: redis.Redis, jobs: Iterable[FailedJob], *, at_front: bool = False) -> tuple[int, int]:
    """Puts each back on its queue, its retries restored; how many, and how many had not failed any more."""
    requeued = left = 0
    with EmbedQueue(connection=client) as queue:
        for job in jobs:
            try:
                queue.requeue(job.id, at_front=at_front)
                requeued += 1
            except (JobNotFoundError, JobStateError):
                left += 1
    return requeued, left


def purge(client: redis.Redis, jobs: Iterable[FailedJob]) -> tuple[int, int]:
    """Deletes each with its result and its membership in its group; how many, and how many were left alone: requeued
    or failed anew since they were looked at, with callbacks that nobody has seen to yet, or waited for by others.
    """
    script = scripts.load(client, __package__, "purge")
    purged = left = 0
    waiting = iter(jobs)
    while some := list(itertools.islice(waiting, PURGE_JOBS)):
        args = [part for job in some for part in (job.queue, job.id, job.ended_at)]
        with translated_errors(client):
            gone = sum(script(keys=[], args=[keys.PREFIX, *args]))
        purged, left = purged + gone, left + len(some) - gone
    return purged, left


def _ask(client: redis.Redis, *command: Any) -> Any:
    """None where a key of another type stands."""
    connection: Any = client
    with translated_errors(client):
        try:
            return connection.execute_command(*command)
        except redis.ResponseError as err:
            return _unless_foreign(err)


def _queues(client: redis.Redis) -> list[str]:
    found = _ask(client, "SMEMBERS", keys.QUEUES) or ()
    return sorted(keys.queue_name(key.decode(errors="replace")) for key in found)


def _count(client: redis.Redis, queue: str) -> int:
    return _ask(client, "ZCARD", keys.failed(queue)) or 0


def _page(client: redis.Redis, queue: str, start: int, end: int) -> list[str]:
    """The ids at these places of the registry, `end` not among them, the last first."""
    members = _ask(client, "ZRANGE", keys.failed(queue), start, end - 1) or ()
    return [member.decode(errors="replace") for member in reversed(members)]


def _read(client: redis.Redis, queue: str, ids: Sequence[str]) -> list[FailedJob]:
    """Those of the jobs that have failed and are still there, the last word of each in its stream."""
    # What cannot be a job's id is none that a client could name.
    named = [job_id for job_id in ids if is_job_id(job_id)]
    if not named:
        return []
    connection: Any = client
    with translated_errors(client):
        pipeline = connection.pipeline(transaction=False)
        pipeline.time()
        for job_id in named:
            pipeline.hmget(keys.job(job_id), *_FIELDS)
            pipeline.xrevrange(keys.results(job_id), count=1)
        (second, _), *replies = [_unless_foreign(reply) for reply in pipeline.execute(raise_on_error=False)]
    jobs = []
    for job_id, fields, entries in zip(named, replies[::2], replies[1::2], strict=True):
        if fields and read_status(fields[0]) in _ENDED:
            jobs.append(_failed_job(job_id, queue, fields, entries, second))
    return jobs


def _unless_foreign(reply: Any) -> Any:
    """The reply; None where a key of another type stands. Raises redis-py's other errors."""
    if not isinstance(reply, Exception):
        return reply
    if isinstance(reply, redis.ResponseError) and is_wrong_type(reply):
        return None
    raise reply


def _failed_job(job_id: str, queue: str, fields: Sequence[bytes | None], entries: Any, now_s: float) -> FailedJob:
    status, origin, ended_at, counted, retries, left, texts = (
        (field or b"").decode(errors="replace") for field in fields
    )
    failure = _failure(job_id, status, entries)
    ended_s = seconds_of(ended_at)
    return FailedJob(
        id=job_id,
        queue=queue or origin,
        code=failure.code,
        message=failure.message,
        retryable=failure.retryable,
        text_index=failure.text_index,
        texts=max(1, _number(texts)),
        attempts=1 + max(_number(counted), _number(retries) - _number(left) if retries and left else 0),
        ended_at="" if ended_s is None else ended_at,
        age_s=None if ended_s is None else max(0.0, now_s - ended_s),
    )


def _failure(job_id: str, status: str, entries: Any) -> JobFailedError:
    if status == JobStatus.STOPPED:
        return JobFailedError("the job was stopped while it ran", code="stopped")
    outcome = entry_outcome(job_id, entries[0][1]) if entries else None
    if isinstance(outcome, JobFailedError):
        return outcome
    return JobFailedError("the job failed and left no reason that can be read", code="unknown")


def _number(field: str) -> int:
    """A job's hash is whatever stands there."""
    return int(field) if field.isdecimal() and field.isascii() and len(field) <= MAX_DIGITS else 0


def _not_failed(client: redis.Redis, job_id: str) -> JobNotFoundError | JobStateError:
    with EmbedQueue(connection=client) as queue:
        status = queue.statuses([job_id])[job_id]
    if status is None:
        return not_found(job_id)
    return JobStateError(f"job {job_id} is {status}; this is about failed jobs, `embedq status` about all")
