"""What became of jobs, read from their hashes and result streams. Pure: says what to ask of Redis and reads the
replies; `results` asks.
"""

from __future__ import annotations

import binascii
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pybase64

from embedq.producer import keys, wire
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import (
    EmbedqError,
    JobCanceledError,
    JobFailedError,
    JobNotFoundError,
    ResultTimeoutError,
    WireError,
)
from embedq.producer.status import JobStatus

#: What a job came to: its embeddings, or why there are none.
Outcome = Embeddings | EmbedqError

#: Seconds of silence after which the watched jobs' statuses are looked at: a job that expired, or that another RQ
#: tool canceled, ends without an entry in its stream.
LOOK_AGAIN_S = 2.0

#: What a result has at most as base64.
MAX_FIELD_BYTES = 4 * (wire.MAX_RESULT_BYTES // 3 + 1)

_SUCCESSFUL, _STOPPED, RETRIED = b"1", b"3", b"4"  # of rq.results.Result.Type
#: What precedes a job's id in the name of its stream.
_RESULTS = keys.results("")
#: What precedes every entry of a stream.
BEFORE_ALL = b"0-0"


class Watch:
    """Jobs that are waited for, each with the last entry of its result stream that was seen."""

    def __init__(self) -> None:
        self._last: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._last)

    def ids(self) -> list[str]:
        return list(self._last)

    def add_fresh(self, job_ids: Iterable[str]) -> None:
        """Jobs whose streams have no entries but the one to come: those just made."""
        self._last.update(dict.fromkeys(job_ids, BEFORE_ALL))

    def drop(self, job_id: str) -> None:
        self._last.pop(job_id, None)

    def looked(self, job_ids: Sequence[str], replies: Sequence[Any]) -> Iterator[tuple[str, Outcome]]:
        """Outcomes of the jobs that have ended; the others are watched from here on.

        A reply may be an EmbedqError: that is what its job came to.
        """
        for job_id, field, entries in zip(job_ids, replies[::2], replies[1::2], strict=True):
            if isinstance(error := field, EmbedqError) or isinstance(error := entries, EmbedqError):
                self.drop(job_id)
                yield job_id, error
                continue
            status, entry = read_status(field), entries[0] if entries else None
            if is_over(status):
                self.drop(job_id)
                yield job_id, final_outcome(job_id, status, entry)
            else:
                self._last[job_id] = entry[0] if entry else BEFORE_ALL

    def rotate(self, number: int) -> None:
        """Puts the first so many behind the others."""
        for job_id in list(itertools.islice(self._last, number)):
            self._last[job_id] = self._last.pop(job_id)

    def streams(self, at_most: int | None = None) -> dict[str, bytes]:
        """What XREAD takes, of the first so many."""
        return {keys.results(job_id): last for job_id, last in itertools.islice(self._last.items(), at_most)}

    def news(self, reply: Any) -> Iterator[tuple[str, Outcome]]:
        """Outcomes of the jobs that XREAD's reply tells of; they are watched no longer."""
        for key, entries in _streams(reply):
            job_id = key.decode().removeprefix(_RESULTS)
            entry_id, fields = entries[-1]
            if fields.get(b"type") == RETRIED:
                self._last[job_id] = entry_id
            else:
                self.drop(job_id)
                yield job_id, entry_outcome(job_id, fields)


def sole_entries(reply: Any) -> list[tuple[bytes, Any]]:
    """Of XREAD's reply the streams with one entry: in one with more the first was not the last word."""
    return [(key, entries) for key, entries in _streams(reply) if len(entries) == 1]


def look_commands(job_ids: Iterable[str]) -> list[tuple[Any, ...]]:
    """To be asked in one transaction: status and last entry of each job."""
    commands: list[tuple[Any, ...]] = []
    for job_id in job_ids:
        commands.append(("HGET", keys.job(job_id), "status"))
        commands.append(("XREVRANGE", keys.results(job_id), "+", "-", "COUNT", 1))
    return commands


def not_found(job_id: str) -> JobNotFoundError:
    return JobNotFoundError(f"there is no job {job_id}: it never existed, or it expired")


def is_unknown(job_id: str, outcome: Outcome) -> bool:
    """Whether a server has never heard of the job, or no longer knows of it; not that its result alone has expired."""
    return isinstance(outcome, JobNotFoundError) and str(outcome) == str(not_found(job_id))


def timed_out(job_id: str, timeout_s: float | None) -> ResultTimeoutError:
    return ResultTimeoutError(f"no result of job {job_id} within {timeout_s:g} s; the job goes on, ask again later")


def read_status(field: bytes | None) -> JobStatus | None:
    """RQ's `status` field; a state that this version doesn't know counts as created."""
    if field is None:
        return None
    try:
        return JobStatus(field.decode(errors="replace"))
    except ValueError:
        return JobStatus.CREATED


def entry_outcome(job_id: str, fields: Mapping[bytes, bytes]) -> Outcome:
    """One entry of a result stream as what it means."""
    kind = fields.get(b"type")
    try:
        if kind == _STOPPED:
            return JobCanceledError(f"job {job_id} was canceled")
        if kind == _SUCCESSFUL:
            return _decode_return_value(fields.get(b"return_value", b""))
        return wire.decode_exc_string(fields.get(b"exc_string", b""))
    except WireError as err:
        return err


def fitting(outcome: Outcome, num_texts: int, output: str) -> Outcome:
    """What a job of so many texts came to. A result of more or fewer texts is a WireError: joined with others it would
    give texts the vectors of their neighbours. A failure that names a text which is not there names none.
    """
    if isinstance(outcome, Embeddings):
        if len(outcome) == num_texts and outcome.output == output:
            return outcome
        return WireError(
            f"the result in Redis is of {len(outcome):,} texts ({outcome.output}), the job of {num_texts:,} ({output})"
        )
    if isinstance(outcome, JobFailedError) and outcome.text_index is not None and outcome.text_index >= num_texts:
        return outcome.of_text(None)
    return outcome


def is_over(status: JobStatus | None) -> bool:
    """Whether a job is gone or has ended."""
    return status is None or status.is_terminal


def final_outcome(job_id: str, status: JobStatus | None, entry: Any) -> Outcome:
    """What a job came to that is over; `entry` is the last of its stream."""
    if status is None:
        return not_found(job_id)
    if status is JobStatus.CANCELED:
        return JobCanceledError(f"job {job_id} was canceled")
    if entry is not None:
        return entry_outcome(job_id, entry[1])
    if status is JobStatus.FINISHED:
        return JobNotFoundError(f"the result of job {job_id} has expired; enqueue it again with a longer result_ttl")
    return JobFailedError("the job failed and left no reason", code="unknown")


def _decode_return_value(field: bytes) -> Embeddings:
    """RQ's `return_value` field: base64 of a serialized value. Raises WireError."""
    if len(field) > MAX_FIELD_BYTES:
        raise WireError(f"the result in Redis is too large: {len(field):,} bytes")
    try:
        return wire.decode_result(pybase64.b64decode(field, validate=True))
    except binascii.Error as err:
        raise WireError("the result in Redis is not base64") from err


def _streams(reply: Any) -> Iterable[tuple[bytes, Any]]:
    """XREAD's answer: a list of pairs under RESP2, a dict of nested lists under RESP3."""
    if isinstance(reply, dict):
        return [(key, batches[0]) for key, batches in reply.items()]
    return reply or ()
