"""How long the jobs of a killed worker wait until somebody has them in hand again. A thread of its own.

Follows the executions that a worker held when it died, until each of its jobs is another execution's or has ended.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis

from embedq.producer import keys
from embedq.producer.client import DEFAULT_QUEUE

#: Seconds between two looks.
EVERY_S = 0.15
#: Seconds after a kill in which what the worker had sent before still reaches Redis.
SETTLE_S = 0.3
#: Seconds after which nobody waits for a recovery any longer.
GIVE_UP_S = 60.0
#: Jobs of one worker that are followed.
MAX_FOLLOWED = 1_000


@dataclass(slots=True, eq=False)
class Recovery:
    """Of one killed worker."""

    worker: str
    killed_at: float
    #: `job:execution` pairs that are still the dead worker's; None before they were read
    pairs: set[str] | None = None
    num_jobs: int = 0
    #: seconds until the last of them was claimed again
    took_s: float | None = None
    #: whether it waited for nothing but the lease: Redis was there, and a live worker
    is_undisturbed: bool = False
    latest: str = ""


@dataclass(slots=True)
class Recoveries:
    """A context manager. `is_undisturbed(from, to)`: whether Redis and some worker lived all the time."""

    client: redis.Redis
    is_undisturbed: Callable[[float, float], bool]
    queue: str = DEFAULT_QUEUE
    done: list[Recovery] = field(default_factory=list)
    _open: list[Recovery] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Recoveries:
        self._thread = threading.Thread(target=self._run, name="recoveries", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def killed(self, worker: str) -> None:
        self._open.append(Recovery(worker, time.time()))

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            for recovery in list(self._open):
                with contextlib.suppress(redis.RedisError):
                    self._follow(recovery)

    def _follow(self, recovery: Recovery) -> None:
        now = time.time()
        if now < recovery.killed_at + SETTLE_S:
            return
        ask: Any = self.client
        if recovery.pairs is None:
            held = ask.smembers(keys.worker_executions(recovery.worker))
            recovery.pairs = set(sorted(pair.decode() for pair in held)[:MAX_FOLLOWED])
            recovery.num_jobs = len(recovery.pairs)
        recovery.pairs -= self._recovered(recovery.pairs)
        if recovery.pairs and now < recovery.killed_at + GIVE_UP_S:
            recovery.latest = min(recovery.pairs)
            return
        self._open.remove(recovery)
        if recovery.num_jobs:
            recovery.took_s = now - recovery.killed_at
            recovery.is_undisturbed = self.is_undisturbed(recovery.killed_at, now)
            self.done.append(recovery)

    def _recovered(self, pairs: set[str]) -> set[str]:
        """Those of the pairs whose job is in other hands, or has ended."""
        ordered = sorted(pairs)
        ask: Any = self.client.pipeline(transaction=False)
        for pair in ordered:
            ask.zscore(keys.started(self.queue), pair)
            ask.hget(keys.job(pair.rpartition(":")[0]), "status")
        replies = iter(ask.execute())
        return {pair for pair in ordered if _is_recovered(next(replies), next(replies))}


def _is_recovered(lease: float | None, status: bytes | None) -> bool:
    return lease is None and status != b"queued"
