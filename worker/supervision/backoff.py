"""When a process that ended is started again, and when no more. Knows times, no processes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

#: Seconds before the first new attempt, and before any later one at most; each is twice the one before.
FIRST_S, LONGEST_S = 0.5, 60.0
#: By so much of itself a pause is longer or shorter, so that processes that fell together don't come back together.
JITTER = 0.25
#: Seconds of service after which an end counts as the first.
HEALTHY_S = 60.0
#: So many ends in a row before a process was ready, within so many seconds, are a crash loop.
CRASH_LOOP_ENDS, CRASH_LOOP_S = 5, 600.0


class Backoff:
    """Of one process and its successors."""

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._num_ends = 0
        #: when those ended that were never ready
        self._early: deque[float] = deque(maxlen=CRASH_LOOP_ENDS)

    def pause_s(self, now: float, served_s: float | None) -> float | None:
        """Seconds until the next attempt after an end; None: it is a crash loop.

        served_s: from being ready to the end; None if it was never ready.
        """
        if served_s is None:
            self._early.append(now)
            if len(self._early) == CRASH_LOOP_ENDS and now - self._early[0] <= CRASH_LOOP_S:
                return None
        else:
            self._early.clear()
            if served_s >= HEALTHY_S:
                self._num_ends = 0
        pause_s = min(FIRST_S * 2.0**self._num_ends, LONGEST_S)
        # Counted no further than to the longest pause, which a float would not stand for ever.
        self._num_ends = min(self._num_ends + 1, 32)
        return pause_s * self._uniform(1 - JITTER, 1 + JITTER)

    def reset(self) -> None:
        """Somebody has looked at it: begin anew."""
        self._num_ends = 0
        self._early.clear()
