"""One process at its place, from its start to its end: whether it is well, and the signals it gets.

Knows times and signals; what runs in the process, and what follows its end, is not its business.
"""

from __future__ import annotations

import signal
from typing import Protocol

from embedq.worker.departure import LAST_WORDS_S, SAME_SIGNAL_S
from embedq.worker.supervision.probe import ChildHealth
from embedq.worker.watchdog import MAX_STEP_S

#: Seconds for which a process may say that its work does not move: longer than one answer may mislead.
RED_S = 3.0
#: Seconds without an answer that a process may take which was never ready: it loads libraries and a model, and holds
#: the interpreter meanwhile.
STARTING_SILENT_S = 300.0
#: Seconds beyond its own grace after which a process that was told to end is killed.
EXTRA_GRACE_S = LAST_WORDS_S + 1.0
#: Seconds from SIGTERM to the second one, upon which a worker waits for nothing and gives its jobs back; to SIGKILL.
SECOND_SIGNAL_S, KILL_HUNG_S = SAME_SIGNAL_S + 0.5, 5.0
#: Seconds that a process may take to leave at once.
AT_ONCE_S = LAST_WORDS_S + 1.0


class Process(Protocol):
    """A child. Once `poll` has told its end, `send` does nothing."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def port(self) -> int:
        """Of its HTTP endpoints on the loopback."""
        ...

    def poll(self) -> int | None:
        """The exit status, below 0 the signal; None while it runs."""
        ...

    def send(self, number: int) -> None: ...
    def health(self) -> ChildHealth: ...
    def last_words(self) -> str:
        """The last line it wrote. After its end."""
        ...

    def close(self) -> None:
        """Lets go of what we hold of it. After its end."""
        ...


class Tenure:
    """Attributes: started_at, ready_at (None until the first time), status (None until the end), hung (why, if it was
    ended for that).
    """

    def __init__(self, process: Process, now: float, hang_timeout_s: float) -> None:
        self.process = process
        self.started_at = self._ticked_at = now
        self.ready_at: float | None = None
        self.status: int | None = None
        self.hung: str | None = None
        self._hang_timeout_s = hang_timeout_s
        #: seconds of our own time for which it has said that it is stuck, or nothing
        self._red_s = self._silent_s = 0.0
        #: when which signal is due
        self._due: list[tuple[float, signal.Signals]] = []
        self._is_told = False

    @property
    def is_leaving(self) -> bool:
        return self._is_told or self.hung is not None

    @property
    def is_ready(self) -> bool:
        is_serving = self.ready_at is not None and self.status is None and not self.is_leaving
        return is_serving and self.process.health().is_ready

    def served_s(self, now: float) -> float | None:
        return None if self.ready_at is None else now - self.ready_at

    def tick(self, now: float) -> None:
        # While this process itself stood still, nobody read the answers.
        step_s, self._ticked_at = min(now - self._ticked_at, MAX_STEP_S), now
        if self.status is not None:
            return
        self.status = self.process.poll()
        if self.status is not None:
            return
        self._look(now, step_s)
        while self._due and now >= self._due[0][0]:
            self.process.send(self._due.pop(0)[1])

    def leave(self, now: float, grace_s: float) -> None:
        """In order: what is on the device is finished, the rest given back."""
        self._is_told = True
        self._due = [(now, signal.SIGTERM), (now + grace_s + EXTRA_GRACE_S, signal.SIGKILL)]

    def leave_at_once(self, now: float) -> None:
        """After `leave`: a worker takes another signal for that."""
        self._is_told = True
        self._due = [(now, signal.SIGTERM), (now + AT_ONCE_S, signal.SIGKILL)]

    def _look(self, now: float, step_s: float) -> None:
        health = self.process.health()
        self._red_s = self._red_s + step_s if health.is_live is False else 0.0
        self._silent_s = self._silent_s + step_s if health.is_live is None else 0.0
        if health.is_ready and self.ready_at is None:
            self.ready_at = now
        if self.is_leaving:
            return
        silent_limit_s = self._hang_timeout_s if self.ready_at is not None else STARTING_SILENT_S
        if self._red_s > RED_S:
            self._end_hung(now, health.why)
        elif self._silent_s > max(self._hang_timeout_s, silent_limit_s):
            self._end_hung(now, f"no answer for {self._silent_s:.0f} s ({health.why})")

    def _end_hung(self, now: float, why: str) -> None:
        self.hung = why
        self._due = [
            (now, signal.SIGTERM),
            (now + SECOND_SIGNAL_S, signal.SIGTERM),
            (now + KILL_HUNG_S, signal.SIGKILL),
        ]
