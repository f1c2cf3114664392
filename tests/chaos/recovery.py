"""How long the jobs of a killed worker wait until they are taken back, and until somebody has them in hand again.

Follows the executions that a worker held when it died, until each of its jobs is another execution's or has ended. A
thread of its own.
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
    #: `job:execution` pairs whose jobs are in no other hands yet; None before they were read
    pairs: set[str] | None = None
    num_jobs: int = 0
    #: seconds until the last of them was taken back, and until the last was claimed again
    back_s: float | None = None
    took_s: float | None = None
    #: until it was taken back Redis was there, and some worker: it waited for nothing but the lease
    is_undisturbed: bool = False
    #: until it was claimed again nobody else died either, so that no other jobs stood before it
    is_calm: bool = False
    latest: str = ""


@dataclass(slots=True)
class Recoveries:
    """A context manager. Between two moments, `is_undisturbed`: Redis and some worker were there; `is_calm`: and nobody
    died.
    """

    client: redis.Redis
    is_undisturbed: Callable[[float, float], bool]
    is_calm: Callable[[float, float], bool]
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
        leases, statuses = self._look(sorted(recovery.pairs))
        if recovery.back_s is None and not any(leases.values()):
            recovery.back_s = now - recovery.killed_at
            recovery.is_undisturbed = self.is_undisturbed(recovery.killed_at, now)
        recovery.pairs = {pair for pair, status in statuses.items() if leases[pair] or status == b"queued"}
        if recovery.pairs and now < recovery.killed_at + GIVE_UP_S:
            recovery.latest = min(recovery.pairs)
            return
        self._open.remove(recovery)
        if recovery.num_jobs:
            recovery.took_s = now - recovery.killed_at
            recovery.is_calm = self.is_calm(recovery.killed_at, now)
            self.done.append(recovery)

    def _look(self, pairs: list[str]) -> tuple[dict[str, bool], dict[str, bytes | None]]:
        """Of each pair whether it is still leased, and its job's status."""
        ask: Any = self.client.pipeline(transaction=False)
        for pair in pairs:
            ask.zscore(keys.started(self.queue), pair)
            ask.hget(keys.job(pair.rpartition(":")[0]), "status")
        replies = ask.execute()
        leases = [score is not None for score in replies[::2]]
        return dict(zip(pairs, leases, strict=True)), dict(zip(pairs, replies[1::2], strict=True))
