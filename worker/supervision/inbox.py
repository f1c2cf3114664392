"""Signals as messages that one thread reads when it is ready for them, instead of handlers that run in its middle.

For the main thread. Knows no processes.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

#: More than anybody sends before it is read.
_READ_BYTES = 4096


class SignalInbox:
    """A context manager; within the block the signals do nothing else. One that the process was started to ignore
    stays ignored.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self._signals = signals

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {
            number: signal.signal(number, _read_later)
            for number in self._signals
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)
        os.close(self._reader)

    def wait(self, timeout_s: float) -> list[int]:
        """The numbers of the signals that came, in order; as soon as there is one, none after the time."""
        select.select([self._reader], [], [], timeout_s)
        try:
            return list(os.read(self._reader, _READ_BYTES))
        except BlockingIOError:
            return []


def _read_later(_signum: int, _frame: FrameType | None) -> None:
    """Python has written the number into the pipe already."""
