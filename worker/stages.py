"""What each stage of the worker does to jobs: tokenize, encode, publish.

Joins the engine with the claims; knows no threads, and of RQ only that something may follow a job's end.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import redis

from embedq.producer import wire
from embedq.producer.connection import is_passing
from embedq.producer.errors import JobFailedError, WireError
from embedq.producer.wire import EmbedRequest
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.engine import Engine, Piece, Work
from embedq.worker.estimates import ClaimBudget
from embedq.worker.leases import LeaseKeeper
from embedq.worker.planning import ReadyJob
from embedq.worker.sequels import Sequels

logger = logging.getLogger("embedq.worker")

T = TypeVar("T")

#: Seconds between two attempts to publish to a Redis that cannot serve.
RETRY_S = 0.5
#: Characters of texts that are in memory together while they are tokenized, and one job's more. Compressed, a
#: thousandth of it is claimed.
SLICE_CHARS = 4_000_000
#: The failure's code of a job that is another's by now, or canceled: nobody is told.
LOST = "lost"


class WorkerStages:
    """Fulfils `pipeline.Stages`."""

    def __init__(
        self,
        engine: Engine,
        store: ClaimStore,
        leases: LeaseKeeper,
        budget: ClaimBudget,
        ranked_queues: Sequence[str],
        sequels: Sequels,
    ) -> None:
        """ranked_queues: the most urgent first; the others count as urgent as the first of them."""
        self._engine = engine
        self._store = store
        self._leases = leases
        self._budget = budget
        self._ranks = {queue: rank for rank, queue in enumerate(ranked_queues)}
        self._sequels = sequels
        self._count_lock = threading.Lock()
        self.num_finished = 0
        self.num_failed = 0

    def tokenize_all(self, claims: Sequence[Claim]) -> tuple[list[Work], list[Outcome]]:
        """What cannot be read or done fails here, each job alone."""
        works: list[Work] = []
        failed: list[Outcome] = []
        while claims:
            some, some_failed, claims = self.tokenize(claims)
            works += some
            failed += some_failed
        return works, failed

    def tokenize(self, claims: Sequence[Claim]) -> tuple[list[Work], list[Outcome], Sequence[Claim]]:
        """The first of the claims, as far as their texts go together in memory, and the claims that are left."""
        failed: list[Outcome] = []
        readable: list[Claim] = []
        requests: list[EmbedRequest] = []
        chars = num_read = 0
        for claim in claims:
            try:
                request = _read_request(claim)
                requests.append(request)
                readable.append(claim)
                chars += sum(map(len, request.texts))
            except WireError as err:
                failed.append(Outcome.failed(claim, JobFailedError(str(err), code=err.code)))
            num_read += 1
            if chars >= SLICE_CHARS:
                break
        works: list[Work] = []
        for claim, tokenized in zip(readable, self._engine.tokenize_all(requests), strict=True):
            if isinstance(tokenized, JobFailedError):
                failed.append(Outcome.failed(claim, tokenized))
            else:
                tokenized.tag, tokenized.queued_s = claim, claim.queued_s
                # Nobody needs the texts any more, which may be far more than the bytes that were claimed.
                tokenized.request = EmbedRequest([], tokenized.request.options)
                works.append(tokenized)
        self._budget.learn(sum([len(work.tag.data) for work in works]), sum([sum(work.lengths) for work in works]))
        return works, failed, claims[num_read:]

    def ready_job(self, work: Work) -> ReadyJob:
        return work.ready(self._ranks.get(work.tag.queue, 0))

    def encode(self, batch: Sequence[Piece]) -> list[Work]:
        """Jobs that were canceled or taken over are encoded no further."""
        works = dict.fromkeys([work for work, _ in batch if work.failure is None])
        lost = [work for work in works if self._leases.is_lost(work.tag)]
        for work in lost:
            work.failure = JobFailedError("no longer this worker's", code=LOST)
        return lost + self._engine.encode(batch)

    def publish(self, done: Sequence[Work | Outcome]) -> None:
        """Sent until Redis has it or the leases are over: what was computed is not lost to a short outage."""
        works = [item for item in done if isinstance(item, Work)]
        outcomes = [item for item in done if isinstance(item, Outcome)] + self._outcomes(works)
        self._tell_failures([outcome for outcome in outcomes if outcome.kind != "finished"])
        if outcomes:
            self._send(outcomes)
        self._leases.drop([work.tag for work in works] + [outcome.claim for outcome in outcomes])

    def _outcomes(self, works: Sequence[Work]) -> list[Outcome]:
        held = [work for work in works if work.failure is None or work.failure.code != LOST]
        outcomes: list[Outcome] = []
        for work, finished in zip(held, self._engine.finish_all(held), strict=True):
            if isinstance(finished, JobFailedError):
                outcomes.append(Outcome.failed(work.tag, finished))
            else:
                outcomes.append(Outcome.finished(work.tag, wire.encode_result(finished), work.busy_s))
        return outcomes

    def _send(self, outcomes: Sequence[Outcome]) -> None:
        what = f"results of {len(outcomes)} jobs"
        try:
            with_sequel = self._until_served(lambda: self._store.publish(outcomes), what)
        except redis.RedisError as err:
            if not is_passing(err):
                raise
            logger.error("no Redis for the time of a lease (%s): %d jobs will be done again", err, len(outcomes))
            return
        with self._count_lock:
            self.num_finished += sum([outcome.kind == "finished" for outcome in outcomes])
        for outcome in outcomes:
            if outcome.kind != "finished":
                self._sequels.report(outcome.claim.job_id, outcome.payload)
        try:
            for outcome in with_sequel:
                follow = functools.partial(self._sequels.follow, outcome.claim.queue, outcome.claim.job_id)
                self._until_served(follow, "what follows a job")
        except redis.RedisError as err:
            if not is_passing(err):
                raise
            logger.error("no Redis for the time of a lease (%s): what follows the jobs is taken up later", err)

    def _until_served(self, action: Callable[[], T], what: str) -> T:
        """Calls until Redis serves, for the time of a lease; then raises redis-py's error."""
        give_up_at = time.monotonic() + self._store.lease_s
        while True:
            try:
                return action()
            except redis.RedisError as err:
                if not is_passing(err) or time.monotonic() > give_up_at:
                    raise
                logger.warning("%s must wait for Redis: %s", what, err)
                time.sleep(RETRY_S)

    def _tell_failures(self, failed: Sequence[Outcome]) -> None:
        """One line however many fail at once; which ones they are is for debugging."""
        with self._count_lock:
            self.num_failed += len(failed)
        for code, number in Counter([outcome.code for outcome in failed]).items():
            logger.warning("failed jobs: %d, code %s", number, code)
        for outcome in failed:
            logger.debug("job %s failed: %s", outcome.claim.job_id, outcome.code)


def _read_request(claim: Claim) -> EmbedRequest:
    """Raises WireError."""
    if claim.refused_bytes:
        raise WireError(f"the job's data has {claim.refused_bytes:,} bytes; at most {wire.MAX_DATA_BYTES:,} go")
    return wire.decode_request(claim.data)
