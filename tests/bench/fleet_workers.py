"""Workers without a device: they claim and publish as real ones do, and wait for the time that encoding would take.

A thread each, with `ClaimStore` and connections of its own; results are made beforehand. Nothing is tokenized, planned
or serialized, which is the worker's own time and not the server's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from embedq.producer.connection import connect
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.pipeline import PUBLISH_BYTES, PUBLISH_JOBS
from tests.bench.fleet_jobs import QUEUE, Kind

LEASE_S = 60.0
#: More than any claim has: here the number of jobs bounds it, as a real worker knows what bytes come to in tokens.
MANY_BYTES = 1 << 40


@dataclass(slots=True)
class Told:
    """What one worker did, and how long each of its calls took."""

    num_jobs: int = 0
    claims_s: list[float] = field(default_factory=list)
    publications_s: list[float] = field(default_factory=list)
    #: micro-batches that began later than the device was free
    num_late: int = 0


class SimulatedWorker:
    """One device's worker. `cycle_s`: what a micro-batch takes on the device; 0: nothing, and it never waits."""

    def __init__(self, url: str, name: str, kind: Kind, payload: bytes, batch_jobs: int, cycle_s: float = 0.0) -> None:
        self.told = Told()
        self._client = connect(url)
        self._store = ClaimStore(self._client, name, LEASE_S)
        self._batch_jobs, self._cycle_s = batch_jobs, cycle_s
        self._per_call = max(1, min(PUBLISH_JOBS, PUBLISH_BYTES // kind.vector_bytes))
        self._payload = payload

    def work(self, should_go_on: Callable[[], bool], start_after_s: float = 0.0) -> None:
        """Until it is told to stop, or finds the queue empty where it does not wait for a device.

        The device takes the next micro-batch when it is done with the last: what is claimed and published meanwhile
        costs it nothing unless that takes longer.
        """
        device_free_at = time.monotonic() + start_after_s
        while should_go_on():
            wait_s = device_free_at - time.monotonic()
            if self._cycle_s and wait_s > 0:
                time.sleep(wait_s)
            elif self._cycle_s:
                self.told.num_late += 1
                device_free_at = time.monotonic()
            device_free_at += self._cycle_s
            claims = self._claim()
            if not claims and not self._cycle_s:
                return
            self._publish(claims)

    def close(self) -> None:
        self._client.close()

    def _claim(self) -> Sequence[Claim]:
        began_at = time.perf_counter()
        claims = self._store.claim([QUEUE], self._batch_jobs, MANY_BYTES).claims
        self.told.claims_s.append(time.perf_counter() - began_at)
        return claims

    def _publish(self, claims: Sequence[Claim]) -> None:
        for start in range(0, len(claims), self._per_call):
            outcomes = [
                Outcome(claim, "finished", self._payload, 0.01) for claim in claims[start : start + self._per_call]
            ]
            began_at = time.perf_counter()
            self._store.publish(outcomes)
            self.told.publications_s.append(time.perf_counter() - began_at)
        self.told.num_jobs += len(claims)


class SimulatedFleet:
    """A context manager: workers that work until it ends. Raises what one of them raised."""

    def __init__(self, workers: Sequence[SimulatedWorker], starts_after_s: Sequence[float] | None = None) -> None:
        self.workers = workers
        self._starts = starts_after_s or [0.0] * len(workers)
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=each, daemon=True)
            for each in zip(workers, self._starts, strict=True)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        """Until all have ended by themselves, or were told to."""
        for thread in self._threads:
            thread.join()
        for worker in self.workers:
            worker.close()
        if self._failures:
            raise self._failures[0]

    def _run(self, worker: SimulatedWorker, start_after_s: float) -> None:
        try:
            worker.work(lambda: not self._stop.is_set(), start_after_s)
        except BaseException as err:
            self._failures.append(err)
            self._stop.set()
