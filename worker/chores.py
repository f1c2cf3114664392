"""What is to be done now and then, and may take long: on a thread of its own, so that nothing urgent waits for it.

Knows no jobs; what the chores are is the worker's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import redis

logger = logging.getLogger("embedq.worker")

#: Seconds between two ticks.
TICK_EVERY_S = 1.0
#: Seconds that the end waits for a chore under way: what it leaves undone another worker takes up.
PATIENCE_S = 2.0


class Chores:
    """Does what is submitted, one after the other, and `on_tick` each second. What they raise is logged."""

    def __init__(self, on_tick: Callable[[], object]) -> None:
        self._on_tick = on_tick
        self._submitted: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="embedq-chores", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, chore: Callable[[], object]) -> None:
        self._submitted.put(chore)

    def stop(self) -> None:
        self._is_stopping = True
        self.submit(lambda: None)
        if self._thread.is_alive():
            self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        next_tick = time.monotonic()
        while not self._is_stopping:
            try:
                self._do(self._submitted.get(timeout=max(0.0, next_tick - time.monotonic())))
            except queue.Empty:
                next_tick = time.monotonic() + TICK_EVERY_S
                self._do(self._on_tick)

    def _do(self, chore: Callable[[], object]) -> None:
        try:
            chore()
        except redis.RedisError as err:
            logger.warning("a chore could not be done: %s", err)
        except Exception:
            logger.exception("a chore could not be done")
