"""The commands that RQ publishes to a worker (`rq.command`), and on a channel of ours which jobs were canceled.

Knows payloads. What a command does is given: a callable for each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("embedq.worker")

#: Seconds before the next look at a channel that could not be read.
RETRY_S = 2.0
#: What a message may have; RQ's commands are a tenth of it. Parsed, one byte of JSON becomes thirty.
MAX_MESSAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class CommandHandler:
    """Takes messages of the worker's channel, on the thread that reads it, which no message ends."""

    on_shutdown: Callable[[], None]
    #: job id, and the execution's where only that one is meant
    on_stop: Callable[[str, str | None], None]
    on_cancel: Callable[[str], None]

    def handle(self, message: Any) -> None:
        """A message as redis-py gives it. What cannot be read or done is logged."""
        with _logged():
            self._carry_out(json.loads(_short(message["data"])))

    def handle_cancel(self, message: Any) -> None:
        """The same on the other channel, where each message is a job's id."""
        with _logged():
            self.on_cancel(_short(message["data"]).decode())

    def _carry_out(self, payload: Any) -> None:
        command = payload["command"]
        if command == "shutdown":
            logger.info("told to shut down by a command")
            self.on_shutdown()
        elif command == "stop-job":
            self.on_stop(_text(payload, "job_id"), None)
        elif command == "stop-execution":
            self.on_stop(_text(payload, "job_id"), _text(payload, "execution_id"))
        elif command == "kill-horse":
            logger.info("told to kill its horse: this worker has none, its jobs share one process")
        else:
            logger.warning("a command on this worker's channel is unknown")


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception as err:
        # Its text is anybody's.
        logger.warning("a command on this worker's channel could not be carried out: %s", type(err).__name__)
        logger.debug("the command's error", exc_info=True)


def survive(error: BaseException, *_: Any) -> None:
    """redis-py's exception handler for the thread that reads the channel: it goes on, whatever it was.

    redis-py connects and subscribes again by itself.
    """
    logger.warning("this worker's channel could not be read: %s", error)
    time.sleep(RETRY_S)


def _short(data: bytes) -> bytes:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"the message has {len(data):,} bytes")
    return data


def _text(payload: Any, field: str) -> str:
    value = payload[field]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} is not a string")
    return value
