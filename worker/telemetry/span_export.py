"""Where spans go: by OTLP over HTTP, as OpenTelemetry's environment variables say, from a thread of their own.

OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS, ..., OTEL_TRACES_SAMPLER, OTEL_BSP_* and OTEL_RESOURCE_ATTRIBUTES are read by the
SDK. Knows no jobs.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from embedq.producer.tracing import TRACER

#: What OTEL_SERVICE_NAME overrides.
SERVICE_NAME = "embedq-worker"
PROTOCOL = "http/protobuf"
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

logger = logging.getLogger("embedq.worker")


def open_tracer(worker_name: str) -> tuple[trace.Tracer, Callable[[float], None]]:
    """A tracer, and what sends the last of its spans, for so many seconds at most.

    A process that has set up OpenTelemetry already, as `opentelemetry-instrument` does, keeps what it has.
    """
    version = importlib.metadata.version("embedq")
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        return provider.get_tracer(TRACER, version), lambda timeout_s: _within(timeout_s, provider.force_flush)
    own = _provider(worker_name, version)
    return own.get_tracer(TRACER, version), lambda timeout_s: _within(timeout_s, own.shutdown)


def _provider(worker_name: str, version: str) -> TracerProvider:
    for variable in PROTOCOL_VARIABLES:
        if (named := os.environ.get(variable, PROTOCOL)) != PROTOCOL:
            logger.warning("%s=%.40r is not spoken here; spans go by %s", variable, named, PROTOCOL)
    ours = {"service.name": SERVICE_NAME, "service.version": version, "service.instance.id": worker_name}
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    # Not at exit: then a collector that does not answer would outlast the grace.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _within(timeout_s: float, action: Callable[[], object]) -> None:
    """What is not done in time goes on beside, and ends with the process."""
    thread = threading.Thread(target=action, name="embedq-spans", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        logger.warning("the last spans could not be sent within %.1f s", timeout_s)
