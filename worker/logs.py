"""How log lines look: for people, or one JSON object a line. Configures the root logger, once, for a process."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson

from embedq.producer.checks import printable
from embedq.worker.settings import LogFormat


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class LineFormatter(logging.Formatter):
    """A line for people. What a job or a message brought into it begins no other line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = printable(record.message)
        return super().formatMessage(record)


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Everything of `level` and above to stderr; of RQ and of libraries only what matters."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if log_format == "json" else LineFormatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("embedq").setLevel(level)
    # RQ says at INFO what embedq says already.
    logging.getLogger("rq").setLevel(logging.WARNING)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
