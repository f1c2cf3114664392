"""Several worker processes as one: all are started, kept running, replaced one by one, and stopped by one signal.

    tick -> slots (who runs where) -> tenures (one process each) -> children (how it is started and asked)

Knows the signals and the order of slots; loads no model and holds no connection.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence

from embedq.worker.departure import SAME_SIGNAL_S
from embedq.worker.processes import reap_strangers
from embedq.worker.statuses import signal_name
from embedq.worker.supervision.inbox import SignalInbox
from embedq.worker.supervision.slots import Ending, Slot, SlotState
from embedq.worker.supervision.terminals import has_terminal

logger = logging.getLogger("embedq.supervisor")

#: Seconds between two looks at the processes; a signal, such as that of one which ended, is seen at once.
TICK_EVERY_S = 0.2
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Supervisor:
    """Attributes: slots, ticked_at (the time of the last look)."""

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        clock: Callable[[], float] = time.monotonic,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """on_tick: called at each look; what it raises ends everything."""
        self.slots = slots
        self.clock = clock
        self.ticked_at = clock()
        self._on_tick = on_tick
        #: the first signal to stop, and when it came
        self._asked: tuple[int, float] | None = None
        self._second_signal: int | None = None
        self._to_roll: deque[Slot] = deque()
        self._rolling: Slot | None = None

    def run(self) -> Ending:
        """Returns once no process is left. For the main thread, which the processes are tied to."""
        has_had_terminal = has_terminal()
        with SignalInbox(_SIGNALS) as inbox:
            try:
                self.start(self.clock())
                while not self.is_over:
                    for number in inbox.wait(TICK_EVERY_S):
                        # The shell has gone with its terminal: that is no order to go on with new processes.
                        is_hangup = number == signal.SIGHUP and has_had_terminal and not has_terminal()
                        self.take(signal.SIGTERM if is_hangup else number, self.clock())
                    self.tick(self.clock())
                    if os.getpid() == 1:
                        reap_strangers([pid for slot in self.slots for pid in slot.pids])
                    self._on_tick()
            finally:
                # Only where something of ours failed.
                self._kill_rest()
        return self.ending()

    @property
    def is_told_to_stop(self) -> bool:
        return self._asked is not None

    @property
    def is_over(self) -> bool:
        return all(slot.is_over for slot in self.slots)

    def start(self, now: float) -> None:
        for slot in self.slots:
            slot.start(now)

    def take(self, number: int, now: float) -> None:
        """A signal."""
        if number == signal.SIGHUP:
            self._begin_rolling()
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop(number, now)

    def tick(self, now: float) -> None:
        self.ticked_at = now
        for slot in self.slots:
            slot.tick(now)
        self._roll(now)

    def ending(self) -> Ending:
        """The worst: after a signal to stop of the orders that were not kept, else of the slots that are given up."""
        if self._second_signal is not None:
            return Ending(128 + self._second_signal, f"left at once after a second {signal_name(self._second_signal)}")
        state = SlotState.STOPPED if self._asked else SlotState.GIVEN_UP
        endings = [slot.ending for slot in self.slots if slot.ending and slot.ending.status and slot.state is state]
        return endings[0] if endings else Ending(0)

    # --- stopping

    def _stop(self, number: int, now: float) -> None:
        if self._asked is None:
            logger.info("%s: all processes end", signal_name(number))
            self._asked = number, now
            self._to_roll.clear()
            for slot in self.slots:
                slot.stop(now)
        elif now - self._asked[1] > SAME_SIGNAL_S and self._second_signal is None:
            logger.warning("a second %s: all processes leave at once", signal_name(number))
            self._second_signal = number
            for slot in self.slots:
                slot.stop_at_once(now)

    def _kill_rest(self) -> None:
        for slot in self.slots:
            slot.kill()

    # --- the rolling restart

    def _begin_rolling(self) -> None:
        if self._asked is None:
            logger.info("SIGHUP: rolling restart of %d processes", len(self.slots))
            self._to_roll = deque(self.slots)

    def _roll(self, now: float) -> None:
        if self._rolling is not None and not self._rolling.is_rolling:
            slot, self._rolling = self._rolling, None
            if slot.roll_error is not None and self._asked is None:
                logger.error(
                    "the rolling restart ends at process %d, with %d others as they were: %s",
                    *(slot.index, len(self._to_roll), slot.roll_error),
                )
                self._to_roll.clear()
            elif not self._to_roll and self._asked is None:
                logger.info("the rolling restart is done")
        if self._rolling is None and self._to_roll:
            self._rolling = self._to_roll.popleft()
            self._rolling.roll(now)
