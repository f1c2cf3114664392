"""How a worker ends: when it is told to, when its grace is over, and at once where something hangs.

Knows signals, the grace and exit statuses; what is given back and who is told is the worker's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from embedq.worker.claims import Outcome
from embedq.worker.statuses import EXIT_GRACE_OVER

logger = logging.getLogger("embedq.worker")

#: Two signals within so many seconds are one: Ctrl-C reaches a process group twice.
SAME_SIGNAL_S = 1.0
#: Seconds that a hanging Redis may cost beyond the grace.
LAST_WORDS_S = 2.0


class Departure:
    """Attributes: signal (the number of the first signal, None until one comes)."""

    def __init__(
        self, grace_s: float, on_asked: Callable[[], None], last_words: Callable[[Sequence[Outcome]], None]
    ) -> None:
        """on_asked: begins an orderly end, in a signal's handler.

        last_words: what Redis is to know before the process ends in the middle of something. On a thread of its own,
        for LAST_WORDS_S at most.
        """
        self.signal: int | None = None
        self._grace_s = grace_s
        self._on_asked = on_asked
        self._last_words = last_words
        self._asked_at: float | None = None
        self._timer = threading.Timer(grace_s, self._end_of_grace)
        self._timer.daemon = True

    def ask(self, signum: int) -> None:
        """First signal: finish the micro-batch on the device, give the rest back, exit. A second one: at once."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at, self.signal = now, signum
            self._on_asked()
            self._timer.start()
        elif now - self._asked_at > SAME_SIGNAL_S:
            raise SystemExit(128 + signum)

    def grace_left_s(self) -> float:
        """Seconds; all of it where no signal came."""
        passed_s = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        return max(0.0, self._grace_s - passed_s)

    def done(self) -> None:
        """The worker has ended in time."""
        self._timer.cancel()

    def at_once(self, status: int, outcomes: Sequence[Outcome] = ()) -> NoReturn:
        """Ends the process with its threads in the middle of something."""
        speaker = threading.Thread(target=self._last_words, args=(outcomes,), daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_S)
        logging.shutdown()
        os._exit(status)

    def _end_of_grace(self) -> None:
        """The micro-batch outlasts the grace: give everything back, but wait no longer for that either."""
        logger.error("not done within the grace of %g s; leaving", self._grace_s)
        self.at_once(EXIT_GRACE_OVER)
