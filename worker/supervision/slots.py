"""A place for one worker process, and who takes it next: after an end, after a hang, and in a rolling restart.

Moves by `tick` alone. Knows the rules of replacement; knows no signals of ours and no other slot.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from embedq.worker.statuses import EXIT_GRACE_OVER, EXIT_INTERRUPTED, EXIT_MODEL, EXIT_REDIS, EXIT_USAGE, worker_status
from embedq.worker.supervision.backoff import CRASH_LOOP_ENDS, Backoff
from embedq.worker.supervision.tenure import Process, Tenure

logger = logging.getLogger("embedq.supervisor")

#: Of a process that was never ready in a slot that never had one: a new attempt would end the same way.
INCURABLE = frozenset({EXIT_USAGE, EXIT_REDIS, EXIT_MODEL})
#: Of a process that was told to end while it started. Below 0: before it had handlers.
_ENDED_WHILE_STARTING = frozenset({EXIT_INTERRUPTED, 143, -2, -15})


class SlotState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing_off"
    GIVEN_UP = "given_up"
    #: it has done all that it was to do
    DONE = "done"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Ending:
    """An exit status, and one line of why where that is not 0."""

    status: int
    words: str = ""


@dataclass(frozen=True, slots=True)
class SlotRules:
    grace_s: float
    hang_timeout_s: float
    #: in a rolling restart the new process is ready before the old one is told to end
    start_first: bool
    #: whether a process may have done all its work (--burst, --max-jobs): status 0 is the end of its slot then
    ends_by_itself: bool


class Slot:
    """Attributes: index, place (for people, such as `cuda:0`), state, restarts (number by reason: exit, hung), ending
    (None until the slot is at its end), roll_error (why its last rolling restart failed).
    """

    def __init__(
        self, index: int, place: str, launch: Callable[[], Process], rules: SlotRules, backoff: Backoff | None = None
    ) -> None:
        """launch: starts a process. Raises OSError."""
        self.index, self.place = index, place
        self.restarts: Counter[str] = Counter()
        self.ending: Ending | None = None
        self.roll_error: str | None = None
        self.state = SlotState.BACKING_OFF
        self._launch = launch
        self._rules = rules
        self._backoff = backoff or Backoff()
        self._current: Tenure | None = None
        self._replacement: Tenure | None = None
        #: those that were replaced and have not ended yet
        self._leaving: list[Tenure] = []
        self._next_start_at = 0.0
        self._was_ever_ready = False
        self._is_stopping = self._is_rolling = False

    # --- what others see

    @property
    def is_over(self) -> bool:
        return self.ending is not None and not self._tenures()

    @property
    def is_rolling(self) -> bool:
        return self._is_rolling or bool(self._leaving)

    @property
    def process(self) -> Process | None:
        """The one whose slot it is, if it runs."""
        current = self._current  # others look from their threads
        return current.process if current else None

    @property
    def is_ready(self) -> bool:
        """Also while it is replaced: the old process serves until the new one does."""
        current = self._current
        return current is not None and current.is_ready

    @property
    def pids(self) -> list[int]:
        return [tenure.process.pid for tenure in self._tenures()]

    def describe(self) -> str:
        process, ending = self.process, self.ending
        if process is not None:
            return "ready" if self.is_ready else f"{self.state.value}: {process.health().why}"
        return self.state.value.replace("_", " ") + (f": {ending.words}" if ending and ending.words else "")

    # --- what is done with it

    def start(self, now: float) -> None:
        self._next_start_at = now
        self.tick(now)

    def stop(self, now: float) -> None:
        """All processes end in order; none follows."""
        self._is_stopping, self._is_rolling = True, False
        for tenure in self._tenures():
            if not tenure.is_leaving:
                tenure.leave(now, self._rules.grace_s)
        if self._current is None and self.ending is None:
            self._end(SlotState.STOPPED, Ending(0))

    def stop_at_once(self, now: float) -> None:
        for tenure in self._tenures():
            tenure.leave_at_once(now)

    def kill(self) -> None:
        for tenure in self._tenures():
            tenure.process.send(9)

    def roll(self, now: float) -> None:
        """Replaces the process; one that is given up or in a pause gets another chance. What is done stays done."""
        self.roll_error = None
        if self.state is SlotState.DONE or self._is_stopping:
            return
        self._backoff.reset()
        if self._current is None:
            self.ending, self.state, self._is_rolling = None, SlotState.BACKING_OFF, True
            self._next_start_at = now
        elif self._rules.start_first:
            self._replacement = self._begin(now)
            self._is_rolling = self._replacement is not None
        elif not self._current.is_leaving:
            self._current.leave(now, self._rules.grace_s)
            self._is_rolling = True

    def tick(self, now: float) -> None:
        for tenure in self._tenures():
            self._tick_one(tenure, now)
        if self._current is None and self.ending is None and now >= self._next_start_at:
            self.state = SlotState.STARTING
            self._current = self._begin(now)
            if self._current is None:
                self._follow_failed_start(now)

    # --- how it comes about

    def _tenures(self) -> list[Tenure]:
        return [tenure for tenure in (self._current, self._replacement, *self._leaving) if tenure is not None]

    def _begin(self, now: float) -> Tenure | None:
        try:
            process = self._launch()
        except OSError as err:
            self.roll_error = f"no process can be started: {err}"
            logger.error("process %d cannot be started: %s", self.index, err)
            return None
        logger.info("process %d starts on %s as %s (pid %d)", self.index, self.place, process.name, process.pid)
        return Tenure(process, now, self._rules.hang_timeout_s)

    def _tick_one(self, tenure: Tenure, now: float) -> None:
        was_hung, was_ready = tenure.hung, tenure.ready_at is not None
        tenure.tick(now)
        if tenure.hung and not was_hung:
            logger.error("process %d hangs: %s; it is replaced", self.index, tenure.hung)
        if tenure.ready_at is not None and not was_ready:
            self._follow_ready(tenure, now)
        if tenure.status is not None:
            self._follow_end(tenure, now)
            tenure.process.close()

    def _follow_ready(self, tenure: Tenure, now: float) -> None:
        self._was_ever_ready = True
        logger.info("process %d is ready after %.1f s", self.index, now - tenure.started_at)
        if tenure is self._replacement:
            if self._current is not None:
                if not self._current.is_leaving:
                    self._current.leave(now, self._rules.grace_s)
                self._leaving.append(self._current)
            self._current, self._replacement = tenure, None
        if tenure is self._current:
            self.state, self._is_rolling = SlotState.RUNNING, False

    def _follow_end(self, tenure: Tenure, now: float) -> None:
        if tenure in self._leaving:
            self._leaving.remove(tenure)
            logger.info("process %d: the one before (pid %d) ended with %s", *self._told(tenure))
        elif tenure is self._replacement:
            self._replacement = None
            self._fail_roll(tenure)
        else:
            self._current = None
            self._follow_end_of_current(tenure, now)

    def _follow_end_of_current(self, tenure: Tenure, now: float) -> None:
        assert tenure.status is not None  # it has ended
        if self._is_stopping:
            logger.info("process %d (pid %d) ended with %s", *self._told(tenure))
            self._end(SlotState.STOPPED, self._stopped_ending(tenure))
        elif self._replacement is not None:
            logger.warning("process %d (pid %d) ended with %s before it was replaced", *self._told(tenure))
            self._current, self._replacement = self._replacement, None
            self.state = SlotState.STARTING
        elif self._is_rolling and tenure.is_leaving and not tenure.hung:
            logger.info("process %d (pid %d) ended with %s; its replacement starts", *self._told(tenure))
            self._next_start_at = now
        elif tenure.status == 0 and self._rules.ends_by_itself and not tenure.hung:
            logger.info("process %d (pid %d) is done", self.index, tenure.process.pid)
            self._end(SlotState.DONE, Ending(0))
        else:
            self._restart(tenure, now)

    def _restart(self, tenure: Tenure, now: float) -> None:
        # What a process that was killed wrote last has nothing to do with it.
        words = tenure.process.last_words() if tenure.status and tenure.status > 0 else ""
        what = worker_status(tenure.status or 0) + (f": {words}" if words else "")
        if self._is_rolling:
            self._fail_roll(tenure)
        if not self._was_ever_ready and tenure.status in INCURABLE:
            self._give_up(tenure.status, words, f"ended with {what}; that no restart can change")
            return
        pause_s = self._backoff.pause_s(now, tenure.served_s(now))
        if pause_s is None:
            self._give_up(
                tenure.status or 0, words, f"ended {CRASH_LOOP_ENDS} times before it was ready, at last with {what}"
            )
            return
        self.restarts["hung" if tenure.hung else "exit"] += 1
        self.state, self._next_start_at = SlotState.BACKING_OFF, now + pause_s
        logger.warning(
            "process %d (pid %d) ended with %s; next start in %.1f s", self.index, tenure.process.pid, what, pause_s
        )

    def _follow_failed_start(self, now: float) -> None:
        self._is_rolling = False
        pause_s = self._backoff.pause_s(now, None)
        if pause_s is None:
            self._give_up(1, self.roll_error or "", f"cannot be started: {self.roll_error}")
        else:
            self.state, self._next_start_at = SlotState.BACKING_OFF, now + pause_s

    def _give_up(self, status: int, words: str, why: str) -> None:
        logger.error("process %d is given up: it %s", self.index, why)
        status = status if status > 0 else 128 - status
        self._end(SlotState.GIVEN_UP, Ending(status, words.removeprefix("error: ") or f"process {self.index} {why}"))

    def _fail_roll(self, tenure: Tenure) -> None:
        self._is_rolling = False
        self.roll_error = (
            f"the new process ended with {worker_status(tenure.status or 0)}: {tenure.process.last_words()}"
        )

    def _end(self, state: SlotState, ending: Ending) -> None:
        self.state, self.ending, self._is_rolling = state, ending, False

    def _stopped_ending(self, tenure: Tenure) -> Ending:
        """Killed because its grace was over counts as a grace that was too short."""
        status = tenure.status or 0
        if status == 0 or (tenure.ready_at is None and status in _ENDED_WHILE_STARTING):
            return Ending(0)
        status = EXIT_GRACE_OVER if status == -9 else status if status > 0 else 128 - status
        return Ending(status, f"process {self.index} ended with {worker_status(tenure.status or 0)}")

    def _told(self, tenure: Tenure) -> tuple[int, int, str]:
        return self.index, tenure.process.pid, worker_status(tenure.status or 0)
