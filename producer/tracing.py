"""The span around enqueueing, where the application uses OpenTelemetry, and what its jobs carry of it.

A job's hash has W3C Trace Context in fields of its own, apart from the request: the same request is the same bytes
whoever traces it. Knows no Redis, and imports nothing that the application has not imported before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from embedq.producer.requests import Request

if TYPE_CHECKING:
    from opentelemetry.trace import Span

#: What OpenTelemetry's spans of this package are said to come from.
TRACER = "embedq"
#: Fields of a job's hash, as https://www.w3.org/TR/trace-context/ writes them.
TRACEPARENT_FIELD, TRACESTATE_FIELD = "embedq_traceparent", "embedq_tracestate"
#: Characters of a tracestate beyond which it stays behind: what the standard asks everybody to pass on.
MAX_TRACESTATE_CHARS = 512


@contextmanager
def sending(queue: str, jobs: Sequence[Request]) -> Iterator[tuple[str, ...]]:
    """A PRODUCER span while one call enqueues; gives the fields that the jobs' hashes are to have: name, value, ...

    None without OpenTelemetry, and none in a trace that is not sampled: then workers have nothing to do either. The
    span does not become the current one: between two steps of an operation the caller's code may run.
    """
    if sys.modules.get("opentelemetry.trace") is None:
        yield ()
        return
    from opentelemetry import trace

    span = trace.get_tracer(TRACER).start_span(f"embedq enqueue {queue}", kind=trace.SpanKind.PRODUCER)
    if span.is_recording():
        span.set_attributes(_attributes(queue, jobs))
    try:
        yield _fields(span)
    except BaseException as err:
        # Its type alone: a message may quote what the caller gave.
        span.set_attribute("error.type", type(err).__name__)
        span.set_status(trace.StatusCode.ERROR, type(err).__name__)
        raise
    finally:
        span.end()


def _attributes(queue: str, jobs: Sequence[Request]) -> dict[str, str | int]:
    """By the semantic conventions for messaging, and how many texts it is; never what they say."""
    found: dict[str, str | int] = {
        "messaging.system": "rq",
        "messaging.operation.name": "enqueue",
        "messaging.operation.type": "send",
        "messaging.destination.name": queue,
        "embedq.texts": sum([job.num_texts for job in jobs]),
    }
    if len(jobs) == 1:
        return found | {"messaging.message.id": jobs[0].job_id}
    return found | {"messaging.batch.message_count": len(jobs)}


def _fields(span: Span) -> tuple[str, ...]:
    from opentelemetry.trace.propagation import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return ()
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    fields = (TRACEPARENT_FIELD, carrier["traceparent"])
    state = carrier.get("tracestate", "")
    return (*fields, TRACESTATE_FIELD, state) if 0 < len(state) <= MAX_TRACESTATE_CHARS else fields
