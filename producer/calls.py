"""What the client asks of Redis, step by step, and what the replies mean. Pure: whoever has a connection, blocking
or awaited, does the steps.

An operation is a generator: it yields a `Step`, is sent the reply (or has the EmbedqError thrown in that the step
ended in) and returns its result. Every call of a script may be sent twice by redis-py, after a lost reply.
"""

from __future__ import annotations

import calendar
import itertools
import os
import random
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, TypeVar

import orjson
from rq.defaults import CALLBACK_TIMEOUT

from embedq.producer import keys, requests, tracing, wire
from embedq.producer.checks import shown
from embedq.producer.errors import (
    DuplicateJobError,
    EmbedqError,
    InvalidOptionError,
    JobNotFoundError,
    JobStateError,
    PartialEnqueueError,
    QueueFull,
    QueueServerError,
)
from embedq.producer.options import check_job_id
from embedq.producer.outcomes import not_found, read_status
from embedq.producer.requests import Request
from embedq.producer.settings import FAILURE_TTL_S, MAX_TTL_S, JobSettings, job_ids_of
from embedq.producer.status import JobStatus

#: Jobs whose status is asked for in one round trip.
CHUNK_STATUSES = 10_000
#: Jobs canceled in one call, which looks for each in its queue from end to end.
CHUNK_CANCELS = 100
#: Seconds between two attempts to enqueue on a full queue, at first and at most.
FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.5
#: RQ's time limit of a job, which only a stock `rq worker` applies: 1,024 long texts on one CPU.
JOB_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One call of the Lua script of that name."""

    script: str
    keys: list[str]
    args: list[Any]


@dataclass(frozen=True, slots=True)
class Commands:
    """Plain commands in one round trip; the reply is the list of theirs."""

    commands: list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for so many seconds; the reply is None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WaitFor:
    """From now on these jobs are waited for. The reply: ids and outcomes of those found to have ended already."""

    #: just made: their result streams have no older entries
    fresh: Sequence[str]
    #: there before, so that they may have ended already
    known: Sequence[str]

    @classmethod
    def enqueued(cls, job_ids: Iterable[str], known: Collection[str]) -> WaitFor:
        """Jobs that `enqueue` got, of which it found some known."""
        ids = list(dict.fromkeys(job_ids))
        return cls([job_id for job_id in ids if job_id not in known], [job_id for job_id in ids if job_id in known])


@dataclass(frozen=True, slots=True)
class News:
    """Until a job that is waited for ends. The reply: ids and outcomes of those that have; [] may come too early."""

    timeout_s: float | None
    #: not longer than until there are more texts to take: see `streaming.Take`
    or_texts: bool = False


@dataclass(frozen=True, slots=True)
class Fork:
    """One operation at each of these shards, all at once; only a client of several servers is asked for it.

    The reply, by shard: the operation's result, or the EmbedqError that it ended in.
    """

    operations: Mapping[str, Operation[Any]]


#: One round trip.
RedisStep = ScriptCall | Commands
Step = RedisStep | Pause | WaitFor | News | Fork
Result = TypeVar("Result")
Operation = Generator[Step, Any, Result]

#: The scripts that steps call; before each stands common.lua.
SCRIPTS = ("enqueue", "cancel", "requeue")


@dataclass(frozen=True, slots=True)
class Start:
    """When a job may start: at once, at a second since 1970, or after seconds by the server's clock."""

    kind: Literal["now", "at", "in"] = "now"
    seconds: float = 0


NOW = Start()


def enqueue(
    queue: str, jobs: Sequence[Request], settings: JobSettings, start: Start = NOW
) -> Operation[frozenset[str]]:
    """All of these jobs or none, in one step; the ids that were there already.

    Raises DuplicateJobError, QueueFull, JobNotFoundError (a dependency).
    """
    with tracing.sending(queue, jobs) as traced:
        return (yield from _enqueue(queue, jobs, settings, start, traced))


def _enqueue(
    queue: str, jobs: Sequence[Request], settings: JobSettings, start: Start, traced: Sequence[str]
) -> Operation[frozenset[str]]:
    """traced: the fields that tell workers which trace the jobs belong to."""
    call = _enqueue_call(queue, jobs, settings, start, traced)
    pauses = _pauses(settings.block_timeout)
    while True:
        kind, *rest = yield call
        if kind == b"done":
            return frozenset(job_id.decode() for job_id in rest)
        if kind == b"taken":
            jobs = yield from _as_stored(jobs, [job_id.decode() for job_id in rest])
            call = _enqueue_call(queue, jobs, settings, start, traced)
            continue
        if kind != b"full":
            raise missing(rest[0].decode())
        pause = next(pauses, None)
        if pause is None:
            waited = f", also after {settings.block_timeout:g} s" if settings.block_timeout else ""
            raise QueueFull(
                f"queue {queue} has {rest[0]:,} jobs and takes {settings.max_depth:,} at most{waited}; try again later"
            )
        yield Pause(pause)


def _as_stored(jobs: Sequence[Request], taken: Sequence[str]) -> Operation[list[Request]]:
    """The jobs, those whose ids are taken with the bytes that are there, if these say the same.

    Raises DuplicateJobError if one of them is another request's.
    """
    key_of = {job_id: keys.job(job_id) for job_id in taken}
    replies = yield Commands(
        [command for key in key_of.values() for command in (("HGET", key, "data"), ("EXISTS", key))]
    )
    wanted = {job.job_id: job.data for job in jobs}
    stored: dict[str, bytes] = {}
    for job_id, data, is_there in zip(taken, replies[::2], replies[1::2], strict=True):
        if is_there and not wire.is_same_request(data or b"", wanted[job_id]):
            raise DuplicateJobError(f"job id {job_id} is taken by another request", taken)
        if is_there:  # else it has expired meanwhile, and is enqueued
            stored[job_id] = data
    return [job._replace(data=stored.get(job.job_id, job.data)) for job in jobs]


def enqueue_in_chunks(
    queue: str, jobs: Sequence[Request], settings: JobSettings, start: Start = NOW
) -> Operation[frozenset[str]]:
    """A step per chunk. Raises what `enqueue` raises, and PartialEnqueueError if a chunk after the first fails."""
    job_ids = [job.job_id for job in jobs]
    if settings.dedupe:
        jobs = requests.distinct(jobs)
    known: frozenset[str] = frozenset()
    sent = 0
    for chunk in requests.chunks(jobs, settings):
        try:
            known |= yield from enqueue(queue, chunk, settings, start)
        except EmbedqError as err:
            if not sent:
                raise
            message = f"{sent:,} of {len(jobs):,} jobs are enqueued; then: {err}"
            accepted = {job.job_id for job in jobs[:sent]}
            raise PartialEnqueueError.of(message, job_ids, accepted, retryable=err.retryable) from err
        sent += len(chunk)
    return known


def start_at(moment: object) -> Start:
    """Raises InvalidOptionError for anything but a datetime with a time zone."""
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidOptionError(
            f"{shown(moment)} names no moment: give a datetime with a time zone, as datetime.now(UTC) + delay"
        )
    return Start("at", calendar.timegm(moment.utctimetuple()))


def start_in(delay: object) -> Start:
    """Seconds or a timedelta. Raises InvalidOptionError."""
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_TTL_S:
        raise InvalidOptionError(f"a delay is seconds or a timedelta from 0 to {MAX_TTL_S} s, not {shown(delay)}")
    return Start("in", seconds) if seconds else NOW


def statuses(job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
    """A step per CHUNK_STATUSES; None for a job that is not there, or where a key of another type stands."""
    waiting = iter(job_ids_of(job_ids))
    found: dict[str, JobStatus | None] = {}
    while chunk := list(itertools.islice(waiting, CHUNK_STATUSES)):
        found |= yield from _statuses(chunk)
    return found


def _statuses(job_ids: Sequence[str]) -> Operation[dict[str, JobStatus | None]]:
    try:
        fields = yield Commands([("HGET", keys.job(job_id), "status") for job_id in job_ids])
        return dict(zip(job_ids, map(read_status, fields), strict=True))
    except QueueServerError as err:
        if "WRONGTYPE" not in str(err):
            raise
    kinds = yield Commands([("TYPE", keys.job(job_id)) for job_id in job_ids])
    there = [job_id for job_id, kind in zip(job_ids, kinds, strict=True) if kind == b"hash"]
    found: dict[str, JobStatus | None] = dict.fromkeys(job_ids)
    return found | ((yield from _statuses(there)) if there else {})


def cancel_all(job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
    """A step per CHUNK_CANCELS; the status in which each job was found, None for one that is not there."""
    waiting = iter([check_job_id(job_id) for job_id in job_ids])
    found: dict[str, JobStatus | None] = {}
    while chunk := list(itertools.islice(waiting, CHUNK_CANCELS)):
        replies = yield ScriptCall("cancel", [], [keys.PREFIX, FAILURE_TTL_S, _nonce(), *chunk])
        found.update(zip(chunk, map(read_status, replies), strict=True))
    return found


def requeue(job_id: str, *, at_front: bool) -> Operation[None]:
    """Raises JobNotFoundError, and JobStateError unless the job failed or was canceled."""
    found = yield ScriptCall(
        "requeue",
        [keys.job(check_job_id(job_id)), keys.QUEUES],
        [keys.PREFIX, job_id, _push_command(at_front), _nonce()],
    )
    before = read_status(found)
    if before is None:
        raise not_found(job_id)
    if not before.is_terminal or before is JobStatus.FINISHED:
        raise JobStateError(f"job {job_id} is {before}; only a failed or canceled job can be requeued")


def depth(queue: str) -> Operation[int]:
    [length] = yield Commands([("LLEN", keys.queue(queue))])
    return int(length)


def forget(queue: str, job_ids: Sequence[str]) -> Operation[None]:
    """Deletes finished jobs that nobody else can know, in one step."""
    job_keys = [key for job_id in job_ids for key in (keys.job(job_id), keys.results(job_id))]
    yield Commands([("DEL", *job_keys), ("ZREM", keys.finished(queue), *job_ids)])


def _nonce() -> str:
    return os.urandom(8).hex()


def _push_command(at_front: bool) -> str:
    return "LPUSH" if at_front else "RPUSH"


def _enqueue_call(
    queue: str, jobs: Sequence[Request], settings: JobSettings, start: Start, traced: Sequence[str]
) -> ScriptCall:
    if settings.depends_on and start.kind != "now":
        raise InvalidOptionError("depends_on and a time exclude each other; give one of them")
    shared = (*_shared_fields(settings), *traced)
    return ScriptCall(
        "enqueue",
        [keys.queue(queue), keys.QUEUES],
        [
            *(keys.PREFIX, queue, _push_command(settings.at_front), settings.ttl or 0, settings.max_depth or 0),
            *(int(settings.dedupe), start.kind, start.seconds, settings.group or "", len(settings.depends_on)),
            *(len(shared), *settings.depends_on, *shared),
            *itertools.chain.from_iterable(jobs),
        ],
    )


def missing(job_id: str) -> JobNotFoundError:
    """What a job raises that depends on this one, which is not there."""
    return JobNotFoundError(f"there is no job {job_id} to depend on: it never existed, or it expired")


def _pauses(timeout_s: float) -> Iterator[float]:
    """Ever longer, in all no more than `timeout_s`; not in step with other callers that wait for the same."""
    deadline = time.monotonic() + timeout_s
    longest = FIRST_PAUSE_S
    while (left := deadline - time.monotonic()) > 0:
        yield min(left, longest * random.uniform(0.5, 1))  # nosec B311
        longest = min(2 * longest, LONGEST_PAUSE_S)


@lru_cache(maxsize=256)
def _shared_fields(settings: JobSettings) -> tuple[Any, ...]:
    """The fields of RQ's job hash that all jobs of one call share: name, value, ... The script adds its own."""
    fields: dict[str, Any] = {
        "timeout": JOB_TIMEOUT_S,
        "result_ttl": settings.result_ttl,
        "failure_ttl": settings.failure_ttl,
        "retries_left": settings.retries,
        "embedq_retries": settings.retries,
    }
    if settings.ttl is not None:
        fields["ttl"] = settings.ttl
    if settings.retry_intervals:
        fields["retry_intervals"] = orjson.dumps(settings.retry_intervals)
    if settings.at_front:
        fields["enqueue_at_front"] = 1  # what RQ goes by once the job's time or dependencies have come
    if settings.group is not None:
        fields["group_id"] = settings.group
    if settings.depends_on:
        fields["dependency_id"] = settings.depends_on[0]
        fields["dependency_ids"] = orjson.dumps(settings.depends_on)
    for outcome, function in (("success", settings.on_success), ("failure", settings.on_failure)):
        if function is not None:
            fields[f"{outcome}_callback_name"] = function
            fields[f"{outcome}_callback_timeout"] = CALLBACK_TIMEOUT
    return tuple(itertools.chain.from_iterable(fields.items()))
