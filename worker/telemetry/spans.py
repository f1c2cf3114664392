"""The spans of the jobs that belong to somebody's trace. Knows OpenTelemetry; nothing of Redis.

    embedq enqueue Q                    the producer's
      embedq wait Q                     from enqueueing to the claim
      embedq process Q                  a job in this worker's hands, one for each attempt
        embedq tokenize
        embedq encode                   one for each micro-batch that has texts of it, linked to
        embedq micro-batch              that one, which many jobs share: a child of the first, linked to all
        embedq publish

Only jobs whose producer's trace is sampled have spans, and at most MAX_JOBS_PER_S of them begin in a second: what is
beyond is done as any other job, so that a flood of traced jobs costs the worker a few per cent of a CPU. Children are
made afterwards, with the times that were taken.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from embedq.worker.claims import Claim, Outcome
from embedq.worker.engine import Piece, Work
from embedq.worker.telemetry.tracing import Identity

#: Each costs some 150 microseconds of CPU time, and the exporter's thread as much again.
MAX_JOBS_PER_S = 200
#: Links of a micro-batch: the SDK's own bound.
MAX_LINKS = 128
#: Seconds that the last spans may take at the end, of what the grace leaves.
FLUSH_S = 3.0

#: A sampled parent. Anything else that stands in the field, whoever put it there, is as if nothing did.
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][13579bdf](-[ -~]*)?")
_MEMBER = rb"[a-z0-9][a-z0-9_\-*/@]{0,255}=[!-+\--<>-~]{1,256}"
_TRACESTATE = re.compile(rb"%b(,%b){0,31}" % (_MEMBER, _MEMBER))
_PROPAGATOR = TraceContextTextMapPropagator()

logger = logging.getLogger("embedq.worker")


@dataclass(slots=True, eq=False)
class JobSpan:
    """A traced job in this worker's hands."""

    span: Span
    #: in which the span is the current one
    context: Context

    def child(self, tracer: Tracer, name: str, began_ns: int, links: Sequence[Link] = ()) -> None:
        """One that is over."""
        tracer.start_span(f"embedq {name}", self.context, start_time=began_ns, links=links).end()

    def end(self, outcome: str, code: str = "") -> None:
        self.span.set_attribute("embedq.outcome", outcome)
        if code:
            self.span.set_attribute("error.type", code)
            self.span.set_status(StatusCode.ERROR, code)
        self.span.end()


class JobSpans:
    """Fulfils `tracing.Spans`."""

    are_wanted = True

    def __init__(self, tracer: Tracer, identity: Identity, shut_down: Callable[[float], None]) -> None:
        self._tracer = tracer
        self._identity = identity
        self._shut_down = shut_down
        self._open: dict[Claim, JobSpan] = {}
        #: the second that is under way, and the jobs that began in it
        self._second = 0
        self._num_begun = 0
        self._has_told = False

    def claimed(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            parent = _parent(claim)
            if parent is not None and self._has_room():
                self._begin(claim, parent)

    def _has_room(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._num_begun = second, 0
        self._num_begun += 1
        if self._num_begun > MAX_JOBS_PER_S and not self._has_told:
            self._has_told = True
            logger.warning("more than %d traced jobs a second: the others are done without spans", MAX_JOBS_PER_S)
        return self._num_begun <= MAX_JOBS_PER_S

    def _begin(self, claim: Claim, parent: Context) -> None:
        now_ns = time.time_ns()
        span = self._tracer.start_span(
            f"embedq process {claim.queue}", parent, kind=SpanKind.CONSUMER, start_time=now_ns
        )
        if not span.is_recording():
            return
        span.set_attributes(
            {
                "messaging.system": "rq",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": claim.queue,
                "messaging.message.id": claim.job_id,
                "messaging.client.id": self._identity.worker,
                "embedq.attempt": claim.attempts + 1,
                "embedq.model": self._identity.model,
                "embedq.device": self._identity.device,
            }
        )
        enqueued_ns = now_ns - int(claim.queued_s * 1e9)
        wait = self._tracer.start_span(f"embedq wait {claim.queue}", parent, start_time=enqueued_ns)
        wait.end(now_ns)
        self._open[claim] = JobSpan(span, trace.set_span_in_context(span))

    def _of(self, claims: Iterable[Claim]) -> list[JobSpan]:
        """Of those that are traced."""
        found = [self._open.get(claim) for claim in claims if claim.trace is not None]
        return [job for job in found if job is not None]

    @contextmanager
    def tokenizing(self, claims: Sequence[Claim]) -> Iterator[None]:
        began_ns = time.time_ns()
        yield
        for job in self._of(claims):
            job.child(self._tracer, "tokenize", began_ns)

    @contextmanager
    def encoding(self, batch: Sequence[Piece]) -> Iterator[None]:
        works = dict.fromkeys([work for work, _ in batch if work.tag.trace is not None])
        jobs = {work: job for work in works if (job := self._open.get(work.tag)) is not None}
        if not jobs:
            yield
            return
        began_ns = time.time_ns()
        span = self._micro_batch(batch, list(jobs.values()))
        # The current one, so that what is logged meanwhile names it.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield
            except BaseException as err:
                span.set_status(StatusCode.ERROR, type(err).__name__)
                raise
        links = [Link(span.get_span_context())]
        for work, job in jobs.items():
            job.child(self._tracer, "encode", began_ns, links)
            job.span.set_attributes(_sizes(work))

    def _micro_batch(self, batch: Sequence[Piece], jobs: Sequence[JobSpan]) -> Span:
        return self._tracer.start_span(
            "embedq micro-batch",
            jobs[0].context,
            links=[Link(job.span.get_span_context()) for job in jobs[:MAX_LINKS]],
            attributes={
                "embedq.batch.texts": len(batch),
                "embedq.batch.tokens": sum([work.tokens[place].num_tokens for work, place in batch]),
                "embedq.batch.jobs": len({work for work, _ in batch}),
                "embedq.batch.traced_jobs": len(jobs),
                "embedq.model": self._identity.model,
                "embedq.device": self._identity.device,
            },
        )

    @contextmanager
    def publishing(self, outcomes: Sequence[Outcome]) -> Iterator[None]:
        began_ns = time.time_ns()
        yield
        for outcome in outcomes:
            if outcome.claim.trace is not None and (job := self._open.pop(outcome.claim, None)) is not None:
                job.child(self._tracer, "publish", began_ns)
                job.end(outcome.kind, outcome.code)

    def left(self, claims: Sequence[Claim], why: str) -> None:
        for claim in claims:
            if claim.trace is not None and (job := self._open.pop(claim, None)) is not None:
                job.end(why)

    def close(self, timeout_s: float) -> None:
        self.left(list(self._open), "abandoned")
        self._shut_down(min(FLUSH_S, timeout_s))


def _parent(claim: Claim) -> Context | None:
    """Where the producer's span is the current one; None without a valid one that is sampled."""
    if claim.trace is None or not _TRACEPARENT.fullmatch(claim.trace[0]):
        return None
    traceparent, tracestate = claim.trace
    carrier = {"traceparent": traceparent.decode("ascii")}
    if _TRACESTATE.fullmatch(tracestate):
        carrier["tracestate"] = tracestate.decode("ascii")
    context = _PROPAGATOR.extract(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _sizes(work: Work) -> dict[str, int]:
    return {
        "embedq.texts": len(work.num_tokens),
        "embedq.tokens": sum(work.num_tokens),
        "embedq.batch.texts": work.batch_texts,
        "embedq.batch.tokens": work.batch_tokens,
    }
