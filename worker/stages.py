"""What each stage of the worker does to jobs: tokenize, encode, publish.

Joins the engine with the claims; knows no threads, and of RQ only that something may follow a job's end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import redis

from embedq.model import ModelError
from embedq.producer import wire
from embedq.producer.connection import is_passing, is_wrong_type
from embedq.producer.errors import JobFailedError, NewerVersionError, WireError
from embedq.producer.wire import EmbedRequest
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.engine import Engine, Piece, Work
from embedq.worker.estimates import ClaimBudget
from embedq.worker.failures import ENDINGS, job_failure, said
from embedq.worker.leases import LeaseKeeper
from embedq.worker.planning import ReadyJob
from embedq.worker.sequels import Sequels
from embedq.worker.telemetry.observer import Observer
from embedq.worker.telemetry.tracing import Spans
from embedq.worker.watchdog import Watchdog

logger = logging.getLogger("embedq.worker")

T = TypeVar("T")
#: What a library or a device is busy with: a job, one text of it by its place, or a piece of one.
AtWork = Claim | tuple[Claim, int] | Piece

#: Seconds between two attempts to publish to a Redis that cannot serve: the first, and the longest.
RETRY_FIRST_S, RETRY_LONGEST_S = 0.5, 4.0
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
        watchdog: Watchdog,
        spans: Spans,
        observer: Observer | None = None,
    ) -> None:
        """ranked_queues: the most urgent first; the others count as urgent as the first of them.

        watchdog: watches lists of claims while they are tokenized; the engine's lists of pieces are its too.
        """
        self._engine = engine
        self._store = store
        self._leases = leases
        self._budget = budget
        self._ranks = {queue: rank for rank, queue in enumerate(ranked_queues)}
        self._sequels = sequels
        self._watchdog = watchdog
        self._observer = observer or Observer()
        self._spans = spans
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
        began_at = time.monotonic()
        failed: list[Outcome] = []
        readable: list[Claim] = []
        requests: list[EmbedRequest] = []
        chars = num_read = 0
        for claim in claims:
            try:
                request = _read_request(claim)
                claim.num_texts = len(request.texts)
                requests.append(request)
                readable.append(claim)
                chars += sum(map(len, request.texts))
            except NewerVersionError as err:
                failed.append(Outcome.parked(claim, err))
            except Exception as err:
                failed.append(Outcome.failed(claim, _unreadable(err)))
            num_read += 1
            if chars >= SLICE_CHARS:
                break
        works: list[Work] = []
        with self._charging(lambda: readable), self._watchdog.watching(readable), self._spans.tokenizing(readable):
            of_requests = self._engine.tokenize_all(requests)
        for claim, tokenized in zip(readable, of_requests, strict=True):
            if isinstance(tokenized, JobFailedError):
                failed.append(Outcome.failed(claim, tokenized))
            else:
                tokenized.tag, tokenized.queued_s = claim, claim.queued_s
                # Nobody needs the texts any more, which may be far more than the bytes that were claimed.
                tokenized.request = EmbedRequest([], tokenized.request.options)
                works.append(tokenized)
        self._budget.learn(sum([len(work.tag.data) for work in works]), sum([sum(work.lengths) for work in works]))
        self._observer.tokenized(time.monotonic() - began_at)
        return works, failed, claims[num_read:]

    def one_by_one(self, claim: Claim) -> list[EmbedRequest]:
        """A job's texts as requests of their own; of what cannot be read none: `tokenize` says why."""
        try:
            request = _read_request(claim)
        except Exception:
            return []
        return [EmbedRequest([text], request.options) for text in request.texts]

    def try_tokenizing(self, claim: Claim, index: int, request: EmbedRequest) -> None:
        """Text `index` of a job, to see that the worker survives it; what is wrong with it is `tokenize`'s to tell."""
        with contextlib.suppress(JobFailedError), self._watchdog.watching([(claim, index)]):
            self._engine.tokenize(request)

    def leave(self, claims: Sequence[Claim]) -> None:
        """They are this worker's no longer."""
        self._spans.left(claims, LOST)
        self._leases.drop(claims)

    def ready_job(self, work: Work) -> ReadyJob:
        return work.ready(self._ranks.get(work.tag.queue, 0))

    def encode(self, batch: Sequence[Piece]) -> list[Work]:
        """Jobs that were canceled or taken over are encoded no further."""
        works = dict.fromkeys([work for work, _ in batch if work.failure is None])
        lost = [work for work in works if self._leases.is_lost(work.tag)]
        for work in lost:
            work.failure = JobFailedError("no longer this worker's", code=LOST)
        self._spans.left([work.tag for work in lost], LOST)
        with self._charging(lambda: self._engine.isolation.at_work), self._spans.encoding(batch):
            return lost + self._engine.encode(batch)

    @contextlib.contextmanager
    def _charging(self, at_work: Callable[[], Sequence[AtWork]]) -> Iterator[None]:
        """What ends the worker costs the jobs that were at work an attempt: given back as they were they would end the
        next worker too.
        """
        try:
            yield
        except ENDINGS:
            raise
        except BaseException as err:
            code, message = (err.code, str(err)) if isinstance(err, ModelError) else ("internal", said(err))
            self._send(blamed(at_work(), code, message), time.monotonic())
            raise

    def publish(self, done: Sequence[Work | Outcome]) -> None:
        """Sent until Redis has it, however long that takes: what was computed is kept."""
        began_at = time.monotonic()
        works = [item for item in done if isinstance(item, Work)]
        outcomes = [item for item in done if isinstance(item, Outcome)] + self._outcomes(works)
        self._tell_failures([outcome for outcome in outcomes if outcome.kind in ("failed", "retry")])
        self._tell_parked([outcome for outcome in outcomes if outcome.kind == "parked"])
        if outcomes:
            self._send(outcomes, began_at)
        self._leases.drop([work.tag for work in works] + [outcome.claim for outcome in outcomes])

    def _outcomes(self, works: Sequence[Work]) -> list[Outcome]:
        held = [work for work in works if work.failure is None or work.failure.code != LOST]
        outcomes: list[Outcome] = []
        for work, finished in zip(held, self._engine.finish_all(held), strict=True):
            if isinstance(finished, JobFailedError):
                outcomes.append(Outcome.failed(work.tag, finished))
                continue
            try:
                outcomes.append(Outcome.finished(work.tag, wire.encode_result(finished), work.busy_s))
            except Exception as err:
                outcomes.append(Outcome.failed(work.tag, job_failure(err)))
        return outcomes

    def _send(self, outcomes: Sequence[Outcome], began_at: float) -> None:
        with self._spans.publishing(outcomes):
            with_sequel = self._until_served(lambda: self._store.publish(outcomes), f"results of {len(outcomes)} jobs")
        self._count(outcomes)
        self._observer.published(outcomes, time.monotonic() - began_at)
        for outcome in outcomes:
            if outcome.kind in ("failed", "retry"):
                self._sequels.report(outcome.claim.job_id, outcome.payload)
        for outcome in with_sequel:
            follow = functools.partial(self._sequels.follow, outcome.claim.queue, outcome.claim.job_id)
            self._until_served(follow, "what follows a job")

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        """What Redis took: a job that was another's by then is not among it."""
        became = Counter([outcome.became for outcome in outcomes])
        with self._count_lock:
            self.num_finished += became["finished"]
            self.num_failed += became["failed"] + became["retried"]
        if became["canceled"]:
            claims = self._leases.lose([outcome.claim for outcome in outcomes if outcome.became == "canceled"])
            self._observer.canceled(claims)

    def _until_served(self, action: Callable[[], T], what: str) -> T:
        """Calls until Redis serves; a worker told to stop meanwhile has its grace. Raises what does not pass."""
        retry_s = RETRY_FIRST_S
        while True:
            try:
                return action()
            except redis.RedisError as err:
                if not is_passing(err) and not is_wrong_type(err):
                    raise
                fields = {"event": "redis_unavailable", "error": type(err).__name__}
                logger.warning("%s must wait for Redis (%s); trying again in %.1f s", what, err, retry_s, extra=fields)
                self._observer.kept_waiting()
                time.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_LONGEST_S)

    def _tell_failures(self, failed: Sequence[Outcome]) -> None:
        """One line however many fail at once; which ones they are is for debugging."""
        for code, number in Counter([outcome.code for outcome in failed]).items():
            fields = {"event": "failed_jobs", "jobs": number, "code": code}
            logger.warning("failed jobs: %d, code %s", number, code, extra=fields)
        for outcome in failed:
            fields = {"event": "failed_job", "job": outcome.claim.job_id, "code": outcome.code}
            logger.debug("job %s failed: %s", outcome.claim.job_id, outcome.code, extra=fields)

    def _tell_parked(self, parked: Sequence[Outcome]) -> None:
        if parked:
            logger.warning(
                "%d jobs are of a later wire version than %d, up to which this worker reads: left for a newer one",
                *(len(parked), wire.VERSION),
                extra={"event": "parked_jobs", "jobs": len(parked)},
            )


def _read_request(claim: Claim) -> EmbedRequest:
    """Raises WireError."""
    if claim.refused_bytes:
        raise WireError(f"the job's data has {claim.refused_bytes:,} bytes; at most {wire.MAX_DATA_BYTES:,} go")
    return wire.decode_request(claim.data)


def _unreadable(err: Exception) -> JobFailedError:
    return JobFailedError(str(err), code=err.code) if isinstance(err, WireError) else job_failure(err)


def blamed(at_work: Sequence[AtWork], code: str, message: str) -> list[Outcome]:
    """Another attempt for the jobs that were at work when it was over. A text that was there alone is named."""
    named = [_named(item) for item in at_work]
    index = named[0][1] if len(named) == 1 else None
    if index is not None:
        message = f"text {index}: {message}"
    failure = JobFailedError(message, code=code, retryable=True, text_index=index)
    return [Outcome.failed(claim, failure) for claim in dict.fromkeys(claim for claim, _ in named)]


def _named(item: AtWork) -> tuple[Claim, int | None]:
    """Whose it is, and the place of the text if it is one."""
    if isinstance(item, Claim):
        return item, None
    job, place = item
    return (job, place) if isinstance(job, Claim) else (job.tag, job.texts[place])
