"""Notices that the encoder or the tokenizer does not come back. Knows time; what is to be done then is the caller's.

A call into a device or a library cannot be interrupted, so all that helps is another process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Of the time between two ticks so many seconds count at most: if all of this process stood still, stopped or
#: suspended, that says nothing about the device.
MAX_STEP_S = 2.0


class Watchdog:
    """Watches what several threads are at, one thing each."""

    def __init__(self, limit_s: float, on_hang: Callable[[Any], None]) -> None:
        """on_hang: called from `tick` with what has taken longer than `limit_s`."""
        self._limit_s = limit_s
        self._on_hang = on_hang
        #: by thread: what it is at, and for how many seconds
        self._watched: dict[int, tuple[Any, list[float]]] = {}
        self._ticked_at = time.monotonic()

    @contextmanager
    def watching(self, what: Any) -> Iterator[None]:
        thread = threading.get_ident()
        self._watched[thread] = (what, [0.0])
        try:
            yield
        finally:
            del self._watched[thread]

    def tick(self) -> None:
        """To be called about once a second."""
        now = time.monotonic()
        step_s = min(now - self._ticked_at, MAX_STEP_S)
        self._ticked_at = now
        for what, seconds in list(self._watched.values()):
            seconds[0] += step_s
            if seconds[0] > self._limit_s:
                self._on_hang(what)
