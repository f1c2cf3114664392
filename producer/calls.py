"""What the client asks of Redis, step by step, and what the replies mean. Pure: whoever has a connection, blocking
or awaited, does the steps.

An operation is a generator: it yields a `Step`, is sent the reply (or has the EmbedqError thrown in that the step
ended in) and returns its result. Every call of a script may be sent twice by redis-py, after a lost reply.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from embedq.producer import keys, requests
from embedq.producer.errors import DuplicateJobError, EmbedqError, JobStateError, PartialEnqueueError
from embedq.producer.options import check_job_id
from embedq.producer.outcomes import not_found, read_status
from embedq.producer.requests import Request
from embedq.producer.settings import FAILURE_TTL_S, JobSettings
from embedq.producer.status import JobStatus

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
    #: all at one moment
    is_transaction: bool = False


#: One round trip.
Step = ScriptCall | Commands
Result = TypeVar("Result")
Operation = Generator[Step, Any, Result]

#: The scripts, and whether common.lua stands before them.
SCRIPTS = ("enqueue", "cancel", "requeue")


def enqueue(queue: str, jobs: Sequence[Request], settings: JobSettings) -> Operation[None]:
    """All of these jobs or none, in one step. Raises DuplicateJobError."""
    shared = _shared_fields(queue, settings)
    taken = yield ScriptCall(
        "enqueue",
        [keys.queue(queue), keys.QUEUES],
        [
            *(keys.JOB_PREFIX, _push_command(settings.at_front), settings.ttl or 0, len(shared)),
            *shared,
            *itertools.chain.from_iterable(jobs),
        ],
    )
    if taken:
        ids = [job_id.decode() for job_id in taken]
        raise DuplicateJobError(f"job id {ids[0]} is taken by another request", ids)


def enqueue_in_chunks(queue: str, jobs: Sequence[Request], settings: JobSettings) -> Operation[None]:
    """A step per chunk. Raises what `enqueue` raises, and PartialEnqueueError if a chunk after the first fails."""
    sent = 0
    for chunk in requests.chunks(jobs):
        try:
            yield from enqueue(queue, chunk, settings)
        except EmbedqError as err:
            if not sent:
                raise
            message = f"{sent:,} of {len(jobs):,} jobs are enqueued; then: {err}"
            ids = [job.job_id for job in jobs[:sent]]
            raise PartialEnqueueError(message, ids, retryable=err.retryable) from err
        sent += len(chunk)


def statuses(job_ids: Iterable[str]) -> Operation[dict[str, JobStatus | None]]:
    """None for a job that is not there."""
    ids = [check_job_id(job_id) for job_id in job_ids]
    fields = yield Commands([("HGET", keys.job(job_id), "status") for job_id in ids])
    return {job_id: read_status(field) for job_id, field in zip(ids, fields, strict=True)}


def status(job_id: str) -> Operation[JobStatus]:
    """Raises JobNotFoundError."""
    found = yield from statuses([job_id])
    return _found(job_id, found[job_id])


def cancel(job_id: str) -> Operation[bool]:
    """Whether the job had not ended before. Raises JobNotFoundError."""
    found = yield ScriptCall(
        "cancel",
        [keys.job(check_job_id(job_id)), keys.results(job_id), keys.executions(job_id)],
        [keys.PREFIX, job_id, FAILURE_TTL_S],
    )
    return not _found(job_id, read_status(found)).is_terminal


def requeue(job_id: str, *, at_front: bool) -> Operation[None]:
    """Raises JobNotFoundError, and JobStateError unless the job failed or was canceled."""
    found = yield ScriptCall(
        "requeue",
        [keys.job(check_job_id(job_id)), keys.QUEUES],
        [keys.PREFIX, job_id, _push_command(at_front)],
    )
    before = _found(job_id, read_status(found))
    if not before.is_terminal or before is JobStatus.FINISHED:
        raise JobStateError(f"job {job_id} is {before}; only a failed or canceled job can be requeued")


def depth(queue: str) -> Operation[int]:
    [length] = yield Commands([("LLEN", keys.queue(queue))])
    return int(length)


def _found(job_id: str, found: JobStatus | None) -> JobStatus:
    if found is None:
        raise not_found(job_id)
    return found


def _push_command(at_front: bool) -> str:
    return "LPUSH" if at_front else "RPUSH"


def _shared_fields(queue: str, settings: JobSettings) -> list[Any]:
    """The fields of RQ's job hash that all jobs of one call share: name, value, ... Times come from the server."""
    fields: dict[str, Any] = {
        "status": JobStatus.QUEUED.value,
        "origin": queue,
        "timeout": JOB_TIMEOUT_S,
        "result_ttl": settings.result_ttl,
        "failure_ttl": settings.failure_ttl,
        "retries_left": settings.retries,
        "embedq_retries": settings.retries,
    }
    if settings.ttl is not None:
        fields["ttl"] = settings.ttl
    return list(itertools.chain.from_iterable(fields.items()))
