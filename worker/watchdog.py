"""Notices that the encoder or the tokenizer does not come back. Knows time; what is to be done then is the caller's.

A call into a device or a library cannot be interrupted, so all that helps is another process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Of the time between two ticks so many seconds count at most: if all of this process stood still, stopped or
#: suspended, that says nothing about the device.
MAX_STEP_S = 2.0


@dataclass(slots=True)
class _Watched:
    what: Any
    began_at: float
    #: of this process, without the time for which it stood still
    seconds: float = 0.0


class Watchdog:
    """Watches what several threads are at, one thing each."""

    def __init__(self, limit_s: float, on_hang: Callable[[Any], None]) -> None:
        """on_hang: called from `tick` with what has taken longer than `limit_s`."""
        self._limit_s = limit_s
        self._on_hang = on_hang
        #: by thread: what it is at
        self._watched: dict[int, _Watched] = {}
        self._ticked_at = time.monotonic()

    @contextmanager
    def watching(self, what: Any) -> Iterator[None]:
        thread = threading.get_ident()
        self._watched[thread] = _Watched(what, time.monotonic())
        try:
            yield
        finally:
            del self._watched[thread]

    def stuck(self, limit_s: float) -> list[Any]:
        """What has taken longer than so many seconds, by the last tick."""
        return [watched.what for watched in list(self._watched.values()) if watched.seconds > limit_s]

    def tick(self) -> None:
        """To be called about once a second."""
        now = time.monotonic()
        for watched in list(self._watched.values()):
            watched.seconds += min(now - max(self._ticked_at, watched.began_at), MAX_STEP_S)
            if watched.seconds > self._limit_s:
                self._on_hang(watched.what)
        self._ticked_at = now
