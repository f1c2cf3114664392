"""Jobs in hand that somebody wants no longer: stopped by RQ's command, or canceled.

Called from the thread that reads the worker's channel. The pipeline learns of it through the leases: a job that is lost
is encoded no further, and whatever is published for it changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import redis

from embedq.producer import keys, scripts, wire
from embedq.producer.errors import JobFailedError
from embedq.producer.settings import FAILURE_TTL_S
from embedq.worker.claims import Claim
from embedq.worker.leases import LeaseKeeper
from embedq.worker.sequels import Sequels
from embedq.worker.telemetry.observer import Observer

logger = logging.getLogger("embedq.worker")

#: The failure's code of a stopped job.
STOPPED = "stopped"


class Interruptions:
    """What the commands stop-job, stop-execution and our cancel come to. Raises redis-py's errors."""

    def __init__(
        self,
        client: redis.Redis,
        worker_name: str,
        leases: LeaseKeeper,
        sequels: Sequels,
        observer: Observer | None = None,
    ) -> None:
        self._worker_name = worker_name
        self._leases = leases
        self._sequels = sequels
        self._observer = observer or Observer()
        self._stop = scripts.load(client, __package__, "stop")

    def stop(self, job_id: str, execution_id: str | None = None) -> None:
        """Ends the job as stopped, if it is in hand."""
        claims = self._in_hand(job_id, execution_id)
        if not claims:
            logger.warning("told to stop a job that is not in hand")
            logger.debug("job %.100r is not in hand", job_id, extra={"job": job_id[:100]})
        for claim in claims:
            if self._stop_claim(claim):
                logger.warning("a job is stopped on request")
                logger.debug("job %s is stopped on request", job_id, extra={"job": job_id})
                self._observer.stopped(claim, STOPPED)
                self._sequels.follow_all(claim.queue, [job_id])
            self._leases.lose([claim])

    def cancel(self, job_id: str) -> None:
        """Asks Redis whether the job is still this worker's: a message alone proves nothing."""
        if claims := self._in_hand(job_id, None):
            self._leases.renew(claims)

    def _in_hand(self, job_id: str, execution_id: str | None) -> Sequence[Claim]:
        return [
            claim
            for claim in self._leases.held()
            if claim.job_id == job_id and execution_id in (None, claim.execution_id)
        ]

    def _stop_claim(self, claim: Claim) -> bool:
        reason = JobFailedError("the job was stopped on request", code=STOPPED)
        args = [keys.PREFIX, self._worker_name, claim.queue, claim.job_id, claim.execution_id]
        return bool(self._stop(keys=[], args=[*args, wire.encode_exc_string(reason), FAILURE_TTL_S]))
