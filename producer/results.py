"""Waiting for results: many jobs watched at once through their result streams, without polling.

`XREAD BLOCK` wakes on the entry that a worker (or a cancellation) appends. Only a job that ends without an
entry needs a second look: one that expired, or that another RQ tool canceled; it is taken every few seconds.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import redis

from embedq.producer import keys, wire
from embedq.producer.connection import translated_errors
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

#: Jobs watched in one XREAD; the others wait for their turn.
WINDOW = 128
#: Seconds of silence after which the watched jobs' statuses are looked at.
LOOK_AGAIN_S = 2.0

#: What a job came to: its embeddings, or why there are none.
Outcome = Embeddings | EmbedqError

_SUCCESSFUL, _STOPPED, _RETRIED = b"1", b"3", b"4"  # of rq.results.Result.Type


class ResultReader:
    """Reads outcomes of jobs; one caller at a time."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        timeout = client.connection_pool.connection_kwargs.get("socket_timeout")
        self._slice_s = min(LOOK_AGAIN_S, timeout / 2) if timeout else LOOK_AGAIN_S

    def outcomes(self, job_ids: Iterable[str], timeout_s: float | None) -> Iterator[tuple[str, Outcome]]:
        """Each job once, about as it ends: WINDOW of them are watched at a time, in the given order.

        What has not ended in time comes as ResultTimeoutError.

        `timeout_s` None waits for good, 0 only looks. Raises QueueConnectionError.
        """
        waiting = deque(dict.fromkeys(job_ids))
        watched: dict[str, bytes] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while waiting or watched:
            fresh = [waiting.popleft() for _ in range(min(WINDOW - len(watched), len(waiting)))]
            yield from self._look(fresh, watched)
            if not watched:
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                yield from ((job_id, _timed_out(job_id, timeout_s)) for job_id in watched)
                watched.clear()
                continue
            news = self._block(watched, self._slice_s if left is None else min(left, self._slice_s))
            yield from news.items()
            if not news:
                yield from self._look(list(watched), watched)

    def _look(self, job_ids: list[str], watched: dict[str, bytes]) -> Iterator[tuple[str, Outcome]]:
        """Yields the jobs that have ended; the others join `watched` with their stream's last entry."""
        for job_id, status, entry in self._snapshots(job_ids):
            if status is None:
                outcome: Outcome | None = not_found(job_id)
            elif status.is_terminal:
                outcome = _terminal_outcome(job_id, status, entry)
            else:
                outcome = None
            if outcome is None:
                watched[job_id] = entry[0] if entry else b"0-0"
            else:
                watched.pop(job_id, None)
                yield job_id, outcome

    def _snapshots(self, job_ids: list[str]) -> Iterator[tuple[str, JobStatus | None, Any]]:
        if not job_ids:
            return
        with translated_errors(self._redis):
            pipeline = self._redis.pipeline(transaction=True)
            for job_id in job_ids:
                pipeline.hget(keys.job(job_id), "status")
                pipeline.xrevrange(keys.results(job_id), count=1)
            replies = pipeline.execute()
        for job_id, status, entries in zip(job_ids, replies[::2], replies[1::2], strict=True):
            yield job_id, read_status(status), entries[0] if entries else None

    def _block(self, watched: dict[str, bytes], block_s: float) -> dict[str, Outcome]:
        """Outcomes of the jobs that ended within `block_s`; they leave `watched`."""
        streams = {keys.results(job_id): last for job_id, last in watched.items()}
        with translated_errors(self._redis):
            reply = self._redis.xread(streams, block=max(1, int(block_s * 1000)))
        ids = {keys.results(job_id).encode(): job_id for job_id in watched}
        outcomes: dict[str, Outcome] = {}
        for key, entries in _streams(reply):
            job_id = ids[key]
            entry_id, fields = entries[-1]
            if fields.get(b"type") == _RETRIED:
                watched[job_id] = entry_id
            else:
                del watched[job_id]
                outcomes[job_id] = entry_outcome(job_id, fields)
        return outcomes


def not_found(job_id: str) -> JobNotFoundError:
    return JobNotFoundError(f"there is no job {job_id}: it never existed, or it expired")


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


def _decode_return_value(field: bytes) -> Embeddings:
    """RQ's `return_value` field: base64 of a serialized value. Raises WireError."""
    try:
        return wire.decode_result(base64.b64decode(field, validate=True))
    except binascii.Error as err:
        raise WireError("the result in Redis is not base64") from err


def _terminal_outcome(job_id: str, status: JobStatus, entry: Any) -> Outcome:
    if status is JobStatus.CANCELED:
        return JobCanceledError(f"job {job_id} was canceled")
    if entry is not None:
        return entry_outcome(job_id, entry[1])
    if status is JobStatus.FINISHED:
        return JobNotFoundError(f"the result of job {job_id} has expired; enqueue it again with a longer result_ttl")
    return JobFailedError("the job failed and left no reason", code="unknown")


def _timed_out(job_id: str, timeout_s: float | None) -> ResultTimeoutError:
    return ResultTimeoutError(f"no result of job {job_id} within {timeout_s:g} s; the job goes on, ask again later")


def _streams(reply: Any) -> Iterable[tuple[bytes, Any]]:
    """XREAD's answer: a list of pairs under RESP2, a dict of nested lists under RESP3."""
    if isinstance(reply, dict):
        return [(key, batches[0]) for key, batches in reply.items()]
    return reply or ()
