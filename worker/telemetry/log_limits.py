"""A log that a flood of failures does not flood: of the same warning a few lines a minute, then how many more.

Knows no format and no line's meaning.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from dataclasses import dataclass

#: Lines of one kind that come as they are, and seconds for which the others are counted.
MAX_ALIKE = 5
WINDOW_S = 60.0
#: Kinds that are told apart. Beyond, lines come as they are.
MAX_KINDS = 1000
#: Attribute of a record that stands for others: how many.
REPEATS = "repeats"

#: Logger, level, the message before its arguments are put in, and the code of a failure.
Kind = tuple[str, int, object, object]


@dataclass(slots=True)
class Window:
    """The minute that the first line of a kind has begun."""

    began_at: float
    shown: int = 0
    held: int = 0
    #: in all the lines that were held back
    jobs: int = 0
    last: logging.LogRecord | None = None


class LimitedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """To stderr. What is below WARNING comes as it is.

    The first lines of a kind come at once. What follows within the window is told at its end, or when the handler is
    closed: how many there were, and the last of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[Kind, Window] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """The handler's lock is held, as wherever windows are touched."""
        if record.levelno < logging.WARNING or self._has_room(record):
            super().emit(record)

    def _has_room(self, record: logging.LogRecord) -> bool:
        kind = _kind(record)
        now = time.monotonic()
        window = self._windows.get(kind)
        if window is None or (not window.held and now - window.began_at >= WINDOW_S):
            self._forget_old(now)
            if len(self._windows) >= MAX_KINDS:
                return True
            window = self._windows[kind] = Window(now)
        if window.shown < MAX_ALIKE:
            window.shown += 1
            return True
        window.held += 1
        jobs = getattr(record, "jobs", 0)
        window.jobs += jobs if isinstance(jobs, int) else 0
        window.last = _said(record)
        if window.held == 1:
            self._tell_later(kind, window.began_at + WINDOW_S - now)
        return False

    def _forget_old(self, now: float) -> None:
        if len(self._windows) >= MAX_KINDS:
            over = [kind for kind, each in self._windows.items() if not each.held and now - each.began_at >= WINDOW_S]
            for kind in over:
                del self._windows[kind]

    def _tell_later(self, kind: Kind, seconds: float) -> None:
        timer = threading.Timer(seconds, self._tell, (kind,))
        timer.daemon = True
        # No thread begins while the interpreter ends: then `close` tells.
        with contextlib.suppress(RuntimeError):
            timer.start()

    def _tell(self, kind: Kind) -> None:
        self.acquire()
        try:
            if (window := self._windows.pop(kind, None)) is not None and window.last is not None:
                super().emit(_summary(window, window.last))
        finally:
            self.release()

    def close(self) -> None:
        self.acquire()
        try:
            for kind in list(self._windows):
                self._tell(kind)
        finally:
            self.release()
        super().close()


def _kind(record: logging.LogRecord) -> Kind:
    return record.name, record.levelno, str(record.msg), getattr(record, "code", None)


def _said(record: logging.LogRecord) -> logging.LogRecord:
    """Without what it was made of: an error holds all that was in memory where it was raised."""
    said = copy.copy(record)
    said.msg, said.args, said.exc_info, said.exc_text = record.getMessage(), None, None, None
    return said


def _summary(window: Window, record: logging.LogRecord) -> logging.LogRecord:
    seconds = round(time.monotonic() - window.began_at)
    of_jobs = f", {window.jobs:,} jobs" if window.jobs else ""
    record.msg = f"... {window.held:,} more like this in the last {seconds} s{of_jobs}; the last: {record.msg}"
    setattr(record, REPEATS, window.held)
    if window.jobs:
        record.jobs = window.jobs
    return record
