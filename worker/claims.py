"""The worker's half of the Redis protocol: claim, begin, publish, release, renew, recover.

Knows the scripts and what they take; each runs in one step on the server. Knows nothing of texts or models.
Every method raises redis-py's errors; redis-py may send each call again after a lost reply.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pybase64
import redis

from embedq.producer import keys, scripts, wire
from embedq.producer.errors import JobFailedError, NewerVersionError
from embedq.producer.settings import FAILURE_TTL_S, RESULT_TTL_S
from embedq.worker.staging import StagedScript

#: Bytes of a result from which it goes past the script's arguments.
STAGE_FROM_BYTES = 32 * 1024
#: Ten years: no job has waited for longer.
MAX_WAIT_S = 315_360_000.0
#: Leases taken back in one call.
RECOVER_JOBS = 500


#: What may become of a claim: a failure is tried again while retries are left, and a canceled job comes to nothing.
Became = Literal["", "finished", "failed", "retried", "parked", "canceled"]
#: Of finish.lua's reply.
_DONE, _HAS_SEQUEL, _AGAIN, _CANCELED = 1, 2, 4, 8
_BECAME: dict[str, Became] = {"finished": "finished", "failed": "failed", "retry": "failed", "parked": "parked"}


# Not frozen: one for each job, and a frozen one takes three times as long to make.
@dataclass(slots=True, eq=False)
class Claim:
    """One job leased to this worker."""

    queue: str
    job_id: str
    execution_id: str
    #: RQ's `data` field as it stands in Redis; empty if the hash has none, or if it is beyond all bounds
    data: bytes
    #: seconds from enqueueing to the claim, by the server's clock
    queued_s: float
    #: how often it was tried before, by whichever workers
    attempts: int = 0
    #: whether it was tried before, and is not tried again
    is_last: bool = False
    #: bytes of a `data` that stayed in Redis because it is longer than any of ours; else 0
    refused_bytes: int = 0
    #: 0 until it was read
    num_texts: int = 0
    #: traceparent and tracestate as they stand in Redis, written by anybody; None: no trace, or nobody asked
    trace: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """What one call of claim.lua brought."""

    claims: list[Claim]
    #: `suspended`: `rq suspend` is in force; `empty`: nothing is left on the queues
    state: Literal["suspended", "empty", "more"] = "more"


@dataclass(frozen=True, slots=True)
class Renewed:
    """What one call of renew.lua found."""

    #: claims that are this worker's no longer
    lost: list[Claim]
    #: those of them whose jobs are canceled
    canceled: list[Claim]
    #: false if Redis has forgotten the worker: it lost its data, or the worker slept for long
    is_known: bool


@dataclass(frozen=True, slots=True)
class Recovered:
    """What one call of recover.lua did, in jobs."""

    #: leases that had run out, of which those of canceled jobs are only struck off
    taken: int
    retried: int
    failed: int
    #: ids after which RQ has something to do
    with_sequel: list[str]


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of one claim."""

    claim: Claim
    kind: Literal["finished", "failed", "retry", "parked"]
    #: serialized result, or the reason as RQ stores it; of what is parked, the wire version that it waits for
    payload: bytes
    working_s: float = 0.0
    #: the failure's code
    code: str = ""
    #: what Redis made of it; empty before, and where the job was another's by then
    became: Became = ""

    @classmethod
    def finished(cls, claim: Claim, result: bytes, working_s: float) -> Outcome:
        return cls(claim, "finished", pybase64.b64encode(result), working_s)

    @classmethod
    def failed(cls, claim: Claim, failure: JobFailedError) -> Outcome:
        kind: Literal["failed", "retry"] = "retry" if failure.retryable else "failed"
        return cls(claim, kind, wire.encode_exc_string(failure), code=failure.code)

    @classmethod
    def parked(cls, claim: Claim, reason: NewerVersionError) -> Outcome:
        """Not done and not tried: a worker that reads this version takes it up."""
        return cls(claim, "parked", b"%d" % reason.version, code=reason.code)


class ClaimStore:
    """One worker's claims in Redis."""

    def __init__(self, client: redis.Redis, worker_name: str, lease_s: float, with_traces: bool = False) -> None:
        """with_traces: whether claims are to tell the traces that they belong to."""
        self.worker_name = worker_name
        self.lease_s = lease_s
        self._with_traces = int(with_traces)
        self._nonce = _fresh_nonce()
        self._claim = scripts.load(client, __package__, "claim")
        self._finish = scripts.load(client, __package__, "finish")
        self._finish_staged = StagedScript(client, self._finish)
        self._begin = scripts.load(client, __package__, "begin")
        self._release = scripts.load(client, __package__, "release")
        self._renew = scripts.load(client, __package__, "renew")
        self._recover = scripts.load(client, __package__, "recover")

    def claim(self, queues: Sequence[str], max_jobs: int, max_bytes: int) -> Claimed:
        """Up to `max_jobs` jobs, at least one if one waits, in the queues' order."""
        reply = self._claim(
            keys=[
                keys.SUSPENDED,
                keys.worker(self.worker_name),
                keys.worker_executions(self.worker_name),
                keys.worker_claim(self.worker_name),
                *map(keys.queue, queues),
            ],
            args=[
                *(keys.PREFIX, self.worker_name, self.lease_s, max_jobs, max_bytes, self._nonce, self._with_traces),
                *queues,
            ],
        )
        # Only now: a call that raised may have claimed, and is told again under the same nonce.
        self._nonce = _fresh_nonce()
        claimed_at = float(reply[0])
        return Claimed([_read_claim(fields, claimed_at) for fields in reply[2:]], state=reply[1].decode())

    def begin(self, begun: Sequence[tuple[Claim, JobFailedError]]) -> list[Claim]:
        """Notes on jobs that were tried before what each fails with if this worker dies now; those that are lost.

        Without the note a dead worker costs such a job no attempt.
        """
        args: list[Any] = [keys.PREFIX]
        for claim, failure in begun:
            args += (claim.queue, claim.job_id, claim.execution_id, wire.encode_exc_string(failure))
        return [begun[place - 1][0] for place in self._begin(keys=[], args=args)]

    def publish(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Those after which something is still to be done; each is told what became of it. One round trip."""
        args: list[Any] = [keys.PREFIX, self.worker_name, RESULT_TTL_S, FAILURE_TTL_S]
        streams: list[tuple[str, Sequence[Any]]] = []
        for outcome in outcomes:
            claim, payload = outcome.claim, outcome.payload
            if len(payload) >= STAGE_FROM_BYTES:
                streams.append((keys.staged_results(claim.job_id, claim.execution_id), self._entry(outcome)))
                payload = b""
            args += (outcome.kind, claim.queue, claim.job_id, claim.execution_id, payload, outcome.working_s)
        replies = self._finish_staged(streams, args) if streams else self._finish(keys=[], args=args)
        for outcome, reply in zip(outcomes, replies, strict=True):
            outcome.became = _BECAME[outcome.kind] if reply == _DONE else _became(outcome, reply)
        return [outcome for outcome, reply in zip(outcomes, replies, strict=True) if reply & _HAS_SEQUEL]

    def _entry(self, outcome: Outcome) -> Sequence[Any]:
        """A result stream's entry as finish.lua writes it: name, value, ..."""
        kind, name = (1, "return_value") if outcome.kind == "finished" else (2, "exc_string")
        execution_id = outcome.claim.execution_id
        return "type", kind, "worker_name", self.worker_name, name, outcome.payload, "execution_id", execution_id

    def release(self, claims: Sequence[Claim]) -> list[Claim]:
        """Back to the head of their queues, in the given order; those that were still ours."""
        if not claims:
            return []
        places = self._release(keys=[], args=[keys.PREFIX, self.worker_name, *_flat(claims)])
        return [claims[place - 1] for place in sorted(places)]

    def renew(self, claims: Sequence[Claim], worker_ttl_s: int) -> Renewed:
        """Leases extended from now."""
        is_known, *lost = self._renew(
            keys=[keys.worker(self.worker_name), keys.worker_executions(self.worker_name)],
            args=[keys.PREFIX, self.worker_name, self.lease_s, worker_ttl_s, *_flat(claims)],
        )
        canceled = [claims[-place - 1] for place in lost if place < 0]
        return Renewed([claims[abs(place) - 1] for place in lost], canceled, is_known=bool(is_known))

    def recover(self, queue: str) -> Recovered:
        """Takes back the abandoned jobs of a queue."""
        reason = JobFailedError.abandoned()
        taken, retried, failed, *with_sequel = self._recover(
            keys=[keys.started(queue)],
            args=[keys.PREFIX, queue, FAILURE_TTL_S, wire.encode_exc_string(reason), RECOVER_JOBS],
        )
        return Recovered(taken, retried, failed, [job_id.decode(errors="replace") for job_id in with_sequel])


def _fresh_nonce() -> str:
    return os.urandom(6).hex()


def _became(outcome: Outcome, reply: int) -> Became:
    if reply & _DONE:
        return "retried" if reply & _AGAIN else _BECAME[outcome.kind]
    return "canceled" if reply & _CANCELED else ""


def _read_claim(fields: Sequence[Any], claimed_at: float) -> Claim:
    queue, job_id, execution_id, data, enqueued_at, *tried = fields
    waited_s = _seconds_since(enqueued_at, claimed_at)
    # An id that is no UTF-8 is none of ours: what is done under another name changes nothing.
    claim = Claim(queue.decode(), job_id.decode(errors="replace"), execution_id.decode(), b"", waited_s)
    if isinstance(data, int):
        claim.refused_bytes = data
    else:
        claim.data = data or b""
    if tried:
        claim.attempts, retries_left, *trace = tried
        claim.is_last = claim.attempts > 0 and retries_left == 0
        claim.trace = tuple(trace) or None
    return claim


def _seconds_since(moment: bytes, now: float) -> float:
    """0 for what is no moment at which one of our jobs may have been enqueued."""
    try:
        waited_s = now - datetime.fromisoformat(moment.decode()).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return waited_s if 0 <= waited_s <= MAX_WAIT_S else 0.0


def _flat(claims: Sequence[Claim]) -> list[str]:
    return [part for claim in claims for part in (claim.queue, claim.job_id, claim.execution_id)]
