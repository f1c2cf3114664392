"""How log lines look: for people, or one JSON object a line. Configures a process' loggers, once.

Knows the fields; how often a line may come is `log_limits`'.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

from embedq.producer.checks import printable
from embedq.worker.settings import LogFormat
from embedq.worker.telemetry.log_limits import REPEATS, LimitedHandler

#: What a line may say beside its message, by these names alone; they are the same from release to release.
FIELDS = (
    "event",  # which line it is, whatever its words: micro_batches, failed_jobs, ...
    "queue",
    "queues",
    "jobs",
    "texts",
    "tokens",
    "batches",  # micro-batches
    "ms",  # milliseconds that it took
    "tokens_per_s",  # while encoding
    "fill",  # tokens of micro-batches by what they may have, 0 to 1
    "code",  # of a failure
    "error",  # type of an error
    "model",
    "device",
    "job",  # at DEBUG alone
    REPEATS,  # lines like this one that were left out
)
TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
#: Loggers that a process set up by somebody else, such as `rq worker`, gives no handler.
OWN_LOGGERS = ("embedq", "opentelemetry")


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; worker; FIELDS that the line has; trace_id and span_id where a span is the
    current one; traceback."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._constant: dict[str, Any] = {"worker": worker} if worker else {}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._constant,
            **{name: record.__dict__[name] for name in FIELDS if name in record.__dict__},
            **_current_span(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class LineFormatter(logging.Formatter):
    """A line for people. What a job or a message brought into it begins no other line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = printable(record.message)
        return super().formatMessage(record)


def configure(log_format: LogFormat, level: int = logging.INFO, worker: str = "") -> None:
    """Everything of `level` and above to stderr; of RQ and of libraries only what matters."""
    logging.basicConfig(level=logging.WARNING, handlers=[_handler(log_format, worker)], force=True)
    logging.getLogger("embedq").setLevel(level)
    # RQ says at INFO what embedq says already.
    logging.getLogger("rq").setLevel(logging.WARNING)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)


def configure_own(log_format: LogFormat, level: int | str, worker: str) -> None:
    """For a process whose loggers are somebody else's: ours alone, where nobody listens to them yet."""
    if logging.getLogger("embedq").hasHandlers():
        return
    handler = _handler(log_format, worker)
    for name in OWN_LOGGERS:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("embedq").setLevel(level)


def _handler(log_format: LogFormat, worker: str) -> logging.Handler:
    handler = LimitedHandler()
    handler.setFormatter(JsonFormatter(worker) if log_format == "json" else LineFormatter(TEXT_FORMAT))
    return handler


def _current_span() -> dict[str, str]:
    """Its ids, if this process traces; asks nothing of a process that doesn't."""
    if sys.modules.get("opentelemetry.trace") is None:
        return {}
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
