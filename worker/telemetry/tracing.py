"""What a worker tells of its jobs as spans: the seam, and the one that tells nothing.

Knows when spans are wanted, by `--tracing` or OpenTelemetry's own variables; OpenTelemetry itself is in `spans`, which
is imported only then.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from embedq.producer.errors import ConfigurationError
from embedq.worker.claims import Claim, Outcome

if TYPE_CHECKING:
    from embedq.worker.engine import Piece

#: With one of these an operator has said where spans go.
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: What must be there for spans: the SDK, and its exporter.
MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")

logger = logging.getLogger("embedq.worker")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who encodes, as spans say it."""

    worker: str
    model: str
    device: str


class Spans(Protocol):
    """Told of each job's way through the worker, from several threads. Raises nothing."""

    #: whether claims are to tell the traces that their jobs belong to
    are_wanted: bool

    def claimed(self, claims: Sequence[Claim]) -> None: ...

    def tokenizing(self, claims: Sequence[Claim]) -> AbstractContextManager[object]:
        """Around the tokenization of these jobs together."""

    def encoding(self, batch: Sequence[Piece]) -> AbstractContextManager[object]:
        """Around one micro-batch."""

    def publishing(self, outcomes: Sequence[Outcome]) -> AbstractContextManager[object]:
        """Around one publication; afterwards these jobs have ended."""

    def left(self, claims: Sequence[Claim], why: str) -> None:
        """They are this worker's no longer, and it publishes nothing for them."""

    def close(self, timeout_s: float) -> None:
        """Sends what is left, for so many seconds at most."""


class NoSpans:
    are_wanted = False

    def claimed(self, claims: Sequence[Claim]) -> None: ...

    def tokenizing(self, claims: Sequence[Claim]) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()

    def encoding(self, batch: Sequence[Piece]) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()

    def publishing(self, outcomes: Sequence[Outcome]) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()

    def left(self, claims: Sequence[Claim], why: str) -> None: ...

    def close(self, timeout_s: float) -> None: ...


def open_spans(tracing: bool | None, identity: Identity) -> Spans:
    """tracing: the setting; None: where the environment names an endpoint.

    Raises ConfigurationError if they are asked for and OpenTelemetry is not installed.
    """
    wanted = _environment_wants(os.environ) if tracing is None else tracing
    if not wanted:
        return NoSpans()
    if missing := _missing():
        message = f"tracing needs {missing}; pip install 'embedq[tracing]'"
        if tracing:
            raise ConfigurationError(message)
        logger.warning("an endpoint for spans is set, but %s", message)
        return NoSpans()
    from embedq.worker.telemetry.span_export import open_tracer
    from embedq.worker.telemetry.spans import JobSpans

    tracer, shut_down = open_tracer(identity.worker)
    return JobSpans(tracer, identity, shut_down)


def _environment_wants(environment: Mapping[str, str]) -> bool:
    """By https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/"""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(environment.get(variable) for variable in ENDPOINT_VARIABLES)


def _missing() -> str:
    """The first module that is not installed, or ''."""
    for name in MODULES:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            return name
    return ""
