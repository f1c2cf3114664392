"""Spans from the producer's trace through the worker, against OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState

from embedq.producer import AsyncEmbedQueue, ConfigurationError, EmbedQueue, InvalidTextError, JobFailedError, keys
from embedq.producer.errors import QueueFull
from embedq.worker import WorkerSettings
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.redis_server import free_port
from embedq.worker.telemetry import tracing
from embedq.worker.telemetry.spans import MAX_JOBS_PER_S, JobSpans
from embedq.worker.telemetry.tracing import Identity, NoSpans, open_spans
from tests.conftest import Drain
from tests.queue.test_rq import RQ
from tests.queue.test_worker import EMBEDQ

TRACEPARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = int(TRACEPARENT[3:35], 16)
TEXT = "what nobody but the encoder is to read"
IDENTITY = Identity("w1", "noop:8", "cpu")


class Traces:
    """The spans that have ended in this process."""

    def __init__(self, provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
        self.provider = provider
        self._exporter = exporter
        self.tracer = provider.get_tracer("the application")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == f"embedq {name}"]

    def job_spans(self) -> JobSpans:
        return JobSpans(self.tracer, IDENTITY, lambda _timeout_s: None)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    """An application that has set up OpenTelemetry."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield Traces(provider, exporter)
    provider.shutdown()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def context(span: ReadableSpan) -> SpanContext:
    found = span.get_span_context()
    assert found is not None
    return found


def parent_id(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


def trace_fields(queue: EmbedQueue, job_id: str) -> list[bytes | None]:
    found: list[bytes | None] = queue._redis.hmget(keys.job(job_id), "embedq_traceparent", "embedq_tracestate")
    return found


def test_a_jobs_whole_way_is_one_trace(queue: EmbedQueue, drain: Drain, traces: Traces) -> None:
    with traces.tracer.start_as_current_span("request") as request:
        job = queue.enqueue([TEXT, "another"])
    worker = drain(tracing=True)
    assert len(job.result(timeout=0).vectors) == 2
    spans = {span.name: span for span in traces.spans}
    process, batch = spans["embedq process embed"], spans["embedq micro-batch"]
    parents = {
        "embedq enqueue embed": request.get_span_context().span_id,
        "embedq wait embed": context(spans["embedq enqueue embed"]).span_id,
        "embedq process embed": context(spans["embedq enqueue embed"]).span_id,
        "embedq tokenize": context(process).span_id,
        "embedq micro-batch": context(process).span_id,
        "embedq encode": context(process).span_id,
        "embedq publish": context(process).span_id,
    }
    assert {name: parent_id(span) for name, span in spans.items() if name != "request"} == parents
    assert {context(span).trace_id for span in spans.values()} == {request.get_span_context().trace_id}
    assert linked(spans["embedq encode"]) == {context(batch).span_id}
    assert (spans["embedq enqueue embed"].kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    said = attributes(process)
    assert said["messaging.message.id"] == attributes(spans["embedq enqueue embed"])["messaging.message.id"] == job.id
    assert said["messaging.destination.name"] == "embed"
    assert said["messaging.client.id"] == worker.name
    assert (said["embedq.texts"], said["embedq.attempt"], said["embedq.outcome"]) == (2, 1, "finished")
    assert said["embedq.tokens"] == said["embedq.batch.tokens"] == attributes(batch)["embedq.batch.tokens"]
    assert TEXT not in "".join(span.to_json() for span in traces.spans)


def test_a_micro_batch_is_one_span_that_is_linked_with_the_jobs_that_share_it(
    queue: EmbedQueue, drain: Drain, traces: Traces
) -> None:
    queue.enqueue_many(["a", "b", "c"])
    drain(tracing=True)
    [sent] = traces.named("enqueue embed")
    assert attributes(sent)["messaging.batch.message_count"] == 3
    [batch], jobs = traces.named("micro-batch"), traces.named("process embed")
    assert linked(batch) == {context(job).span_id for job in jobs}
    assert len(jobs) == attributes(batch)["embedq.batch.jobs"] == 3
    assert [linked(encode) for encode in traces.named("encode")] == 3 * [{context(batch).span_id}]
    assert {context(span).trace_id for span in traces.spans} == {context(sent).trace_id}


def test_untraced_jobs_in_a_traced_micro_batch_count_and_have_no_spans(
    queue: EmbedQueue, drain: Drain, traces: Traces
) -> None:
    jobs = queue.enqueue_many(["a", "b", "c"])
    for job in jobs[1:]:
        queue._redis.hdel(keys.job(job.id), "embedq_traceparent")
    drain(tracing=True)
    [process], [batch] = traces.named("process embed"), traces.named("micro-batch")
    assert attributes(process)["messaging.message.id"] == jobs[0].id
    assert attributes(batch)["embedq.batch.texts"] == 3
    assert attributes(batch)["embedq.batch.traced_jobs"] == 1


def test_a_failed_jobs_span_has_its_code(queue: EmbedQueue, drain: Drain, traces: Traces) -> None:
    queue.enqueue(TEXT, model="another")
    drain(tracing=True)
    [process] = traces.named("process embed")
    assert process.status.status_code is trace.StatusCode.ERROR
    assert process.status.description == attributes(process)["error.type"] == "wrong_model"
    assert attributes(process)["embedq.outcome"] == "failed"
    assert len(traces.named("publish")) == 1
    assert not traces.named("encode")


def test_each_attempt_at_a_job_is_a_span_of_the_same_trace(each_url: str, traces: Traces) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue("a text")
        store, spans = ClaimStore(queue._client, "w1", 30, with_traces=True), traces.job_spans()
        for publish in (
            lambda claim: Outcome.failed(claim, JobFailedError("full", code="out_of_memory", retryable=True)),
            lambda claim: Outcome.finished(claim, b"result", 0.5),
        ):
            [claim] = store.claim(["embed"], 10, 10**6).claims
            spans.claimed([claim])
            with spans.publishing([publish(claim)]):
                store.publish([publish(claim)])
    processes = traces.named("process embed")
    told = [(attributes(span)["embedq.attempt"], attributes(span)["embedq.outcome"]) for span in processes]
    assert told == [(1, "retry"), (2, "finished")]
    assert processes[0].status.description == "out_of_memory"
    assert len({context(span).trace_id for span in traces.spans}) == 1


def test_the_event_loops_client_and_embed_pass_the_trace_on(url: str, queue: EmbedQueue, traces: Traces) -> None:
    async def enqueue() -> None:
        async with AsyncEmbedQueue(url) as client:
            await asyncio.gather(client.enqueue("a"), client.enqueue_many(["b", "c"]))

    with traces.tracer.start_as_current_span("request") as request:
        asyncio.run(enqueue())
        with pytest.raises(TimeoutError):
            queue.embed(["d"], timeout=0.01)
    assert [parent_id(span) for span in traces.named("enqueue embed")] == 3 * [request.get_span_context().span_id]
    written = {trace_fields(queue, key.decode().removeprefix("rq:job:"))[0] for key in queue._redis.keys("rq:job:*")}
    sent = [context(span) for span in traces.named("enqueue embed")]
    assert written == {b"00-%032x-%016x-%02x" % (each.trace_id, each.span_id, each.trace_flags) for each in sent}


def test_what_the_tracestate_says_goes_with_the_job_up_to_a_length(queue: EmbedQueue, traces: Traces) -> None:
    fields = []
    for state in ([("vendor", "1")], [(f"vendor{place}", 100 * "x") for place in range(6)]):
        remote = SpanContext(TRACE_ID, 7, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState(state))
        with trace.use_span(NonRecordingSpan(remote)):
            fields.append(trace_fields(queue, queue.enqueue("a text").id))
    assert [state for _, state in fields] == [b"vendor=1", None]
    assert all(parent is not None and parent[:36] == TRACEPARENT[:36] for parent, _ in fields)


def test_a_trace_that_is_not_sampled_leaves_nothing_behind(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch, traces: Traces
) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))
    job = queue.enqueue("a text")
    assert trace_fields(queue, job.id) == [None, None]
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", traces.provider)
    drain(tracing=True)
    assert job.result(timeout=0).vectors.shape == (1, 8)
    assert traces.spans == []


def test_the_same_request_is_the_same_job_whoever_traces_it(
    queue: EmbedQueue, drain: Drain, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = queue.enqueue("a text", dedupe=True)
    fields = trace_fields(queue, first.id)
    assert fields[0] is not None
    assert queue.enqueue("a text", dedupe=True).id == first.id
    named = queue.enqueue("a text", job_id="named")
    queue.enqueue("a text", job_id="named")
    assert trace_fields(queue, first.id) == fields
    # One that starts afresh belongs to the trace of who asks for it now, or to none.
    first.cancel()
    queue.enqueue("a text", dedupe=True)
    assert trace_fields(queue, first.id)[0] not in (None, fields[0])
    first.cancel()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    queue.enqueue("a text", dedupe=True)
    assert trace_fields(queue, first.id) == [None, None]
    # One that is put back by hand keeps its own.
    own = trace_fields(queue, named.id)
    named.cancel()
    queue.requeue(named.id)
    assert trace_fields(queue, named.id) == own != [None, None]


def test_an_enqueueing_that_fails_says_so_without_the_message(queue: EmbedQueue, traces: Traces) -> None:
    queue.enqueue("a text")
    with pytest.raises(QueueFull):
        queue.enqueue(TEXT, max_depth=1)
    with pytest.raises(InvalidTextError):
        queue.enqueue([])  # never on its way
    good, full = traces.named("enqueue embed")
    assert good.status.is_ok or good.status.is_unset
    assert (full.status.description, attributes(full)["error.type"]) == ("QueueFull", "QueueFull")
    assert not full.events


JUNK = [
    (b"", b""),
    (b"00-" + 32 * b"0" + b"-b7ad6b7169203331-01", b""),
    (b"00-0af7651916cd43dd8448eb211c80319c-" + 16 * b"0" + b"-01", b""),
    (b"ff" + TRACEPARENT[2:], b""),
    (TRACEPARENT[:-2] + b"00", b""),
    (TRACEPARENT + b"\n", b""),
    (TRACEPARENT.upper(), b""),
    (b"\xff\xfe" * 20, b"\xff"),
    (TRACEPARENT + b"-" + 10_000 * b"x", b""),
]


@pytest.mark.parametrize("planted", JUNK)
def test_what_is_no_traceparent_is_as_if_nothing_stood_there(
    queue: EmbedQueue, drain: Drain, traces: Traces, planted: tuple[bytes, bytes]
) -> None:
    job = queue.enqueue("a text")
    mapping = dict(zip(("embedq_traceparent", "embedq_tracestate"), planted, strict=True))
    queue._redis.hset(keys.job(job.id), mapping=mapping)
    drain(tracing=True)
    assert job.result(timeout=0).vectors.shape == (1, 8)
    assert [span.name for span in traces.spans] == ["embedq enqueue embed"]


@pytest.mark.parametrize("state", [b"\xff", b"no state", 600 * b"a=b,", b"UPPER=1", b"a=1\nb=2"])
def test_a_tracestate_that_is_none_is_left_out(
    queue: EmbedQueue, drain: Drain, traces: Traces, state: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    job = queue.enqueue("a text")
    queue._redis.hset(keys.job(job.id), "embedq_tracestate", state)
    drain(tracing=True)
    [process] = traces.named("process embed")
    assert not context(process).trace_state
    assert "Invalid key/value" not in caplog.text


def test_a_claim_tells_traces_if_it_is_asked_to_and_again_after_a_lost_reply(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        traced, other = queue.enqueue_many(["a", "b"])
        queue._redis.hset(keys.job(traced.id), "embedq_traceparent", TRACEPARENT)
        asking = ClaimStore(queue._client, "w1", 30, with_traces=True)
        nonce = asking._nonce
        told = [asking.claim(["embed"], 10, 10**6).claims]
        asking._nonce = nonce
        told.append(asking.claim(["embed"], 10, 10**6).claims)
        for claims in told:
            assert [(claim.job_id, claim.trace) for claim in claims] == [
                (traced.id, (TRACEPARENT, b"")),
                (other.id, None),
            ]
            assert [(claim.attempts, claim.is_last) for claim in claims] == [(0, False), (0, False)]
        asking.release(told[1])
        silent = ClaimStore(queue._client, "w2", 30)
        assert [claim.trace for claim in silent.claim(["embed"], 10, 10**6).claims] == [None, None]


def test_a_flood_of_traced_jobs_has_spans_for_some_and_says_so_once(
    traces: Traces, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5.0)
    spans = traces.job_spans()
    claims = [Claim("embed", str(place), "e", b"", 0.0, trace=(TRACEPARENT, b"")) for place in range(1000)]
    spans.claimed(claims)
    monkeypatch.setattr("time.monotonic", lambda: 6.0)
    spans.claimed(claims[-1:])
    spans.left(claims, "released")
    assert len(traces.named("process embed")) == MAX_JOBS_PER_S + 1
    assert caplog.text.count("traced jobs a second") == 1


def test_what_a_worker_gives_back_or_loses_has_a_span_that_ends(traces: Traces) -> None:
    spans = traces.job_spans()
    claims = [Claim("embed", job_id, "e", b"", 0.0, trace=(TRACEPARENT, b"")) for job_id in "abc"]
    spans.claimed(claims)
    spans.left(claims[:1], "released")
    spans.left(claims[:2], "lost")
    spans.close(1.0)
    told = [attributes(span)["embedq.outcome"] for span in traces.named("process embed")]
    assert told == ["released", "lost", "abandoned"]


def test_spans_are_made_where_the_setting_or_the_environment_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, traces: Traces
) -> None:
    assert isinstance(open_spans(None, IDENTITY), NoSpans)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert isinstance(open_spans(None, IDENTITY), JobSpans)
    assert isinstance(open_spans(False, IDENTITY), NoSpans)
    for variable, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            assert isinstance(open_spans(None, IDENTITY), NoSpans)
    monkeypatch.setattr(tracing, "MODULES", ("opentelemetry.absent", "absent.absent"))
    assert isinstance(open_spans(None, IDENTITY), NoSpans)
    assert "pip install 'embedq[tracing]'" in caplog.text
    assert [WorkerSettings.from_environment({"EMBEDQ_TRACING": said}).tracing for said in ("", "no", "1")] == [
        None,
        False,
        True,
    ]
    with pytest.raises(ConfigurationError, match=r"tracing needs opentelemetry\.absent; pip install"):
        open_spans(True, IDENTITY)


WITHOUT = """
import sys
for name in ["opentelemetry", "opentelemetry.trace"] if {blocked} else []:
    sys.modules[name] = None
from embedq.producer import EmbedQueue
from embedq.worker import EmbedWorker, WorkerSettings
with EmbedQueue({url!r}) as queue:
    job = queue.enqueue("a text")
    EmbedWorker(["embed"], connection=queue._client, settings=WorkerSettings(model="noop:8")).work(burst=True)
    assert job.result(timeout=0).vectors.shape == (1, 8)
# redis-py by itself loads the API and the metrics' SDK where they are installed.
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter"))])
"""


@pytest.mark.parametrize("blocked", [True, False])
def test_who_asks_for_no_spans_needs_no_opentelemetry_and_loads_none(url: str, blocked: bool) -> None:
    code = WITHOUT.format(url=url, blocked=blocked)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "[]"


class Collector(HTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []

    def __enter__(self) -> Collector:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


class Endpoint(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


OURS = (*EMBEDQ, "worker")
RQS = (RQ, "worker", "--worker-class", "embedq.worker.EmbedWorker", "embed")


def run_worker(url: str, program: Sequence[str] = OURS, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "EMBEDQ_MODEL": "noop:8", **environment}
    return subprocess.run(
        [*program, "--url", url, "--burst"], env=variables, capture_output=True, text=True, timeout=90
    )


@pytest.mark.parametrize("program", [OURS, RQS], ids=["embedq worker", "rq worker"])
def test_a_worker_process_sends_its_spans_before_it_ends(queue: EmbedQueue, url: str, program: Sequence[str]) -> None:
    job = queue.enqueue("a text")
    queue._redis.hset(keys.job(job.id), "embedq_traceparent", TRACEPARENT)
    with Collector() as collector:
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        ended = run_worker(url, program, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_SERVICE_NAME="vectors")
    assert ended.returncode == 0, ended.stderr
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    of_resources = [resource for _, request in collector.requests for resource in request.resource_spans]
    names = {attribute.value.string_value for each in of_resources for attribute in each.resource.attributes}
    spans = [span for each in of_resources for scope in each.scope_spans for span in scope.spans]
    assert "vectors" in names
    assert {span.trace_id for span in spans} == {TRACE_ID.to_bytes(16, "big")}
    steps = {"wait embed", "process embed", "tokenize", "micro-batch", "encode", "publish"}
    assert {span.name for span in spans} == {f"embedq {step}" for step in steps}


def test_a_collector_that_is_not_there_costs_a_worker_nothing_but_a_moment_at_its_end(
    queue: EmbedQueue, url: str
) -> None:
    jobs = queue.enqueue_many(["a", "b"])
    for job in jobs:
        queue._redis.hset(keys.job(job.id), "embedq_traceparent", TRACEPARENT)
    ended = run_worker(url, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}", EMBEDQ_GRACE_S="2")
    assert ended.returncode == 0, ended.stderr
    assert {status.value for status in queue.statuses([job.id for job in jobs]).values() if status} == {"finished"}
    assert "Traceback" not in ended.stderr
