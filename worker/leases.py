"""Keeping claimed jobs this worker's: renewals, and the recovery of other workers' abandoned jobs.

Runs on a thread with a connection of its own, so that neither a long micro-batch nor a slow publish delays it.
Knows which claims are held, not what becomes of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import redis

from embedq.worker.claims import RECOVER_JOBS, Claim, ClaimStore
from embedq.worker.telemetry.observer import Observer

logger = logging.getLogger("embedq.worker")

#: Renewals within one lease.
RENEWALS = 4
#: Of the time between two renewals: one that comes so much later is late.
LATE = 1.25
#: Seconds between two looks for abandoned jobs, at most.
RECOVER_EVERY_S = 10.0
#: Calls of a queue in one round: more would hold up the renewals.
RECOVER_CALLS = 40
#: Seconds between two ticks, for what somebody else wants done on this thread.
TICK_EVERY_S = 1.0


class LeaseKeeper:
    """Holds the list of this worker's claims, and their leases while the thread runs."""

    def __init__(
        self,
        store: ClaimStore,
        queues: Sequence[str],
        worker_ttl_s: int,
        *,
        on_abandoned: Callable[[str, list[str]], None],
        on_forgotten: Callable[[], None],
        on_tick: Callable[[], object] = lambda: None,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._queues = list(queues)
        self._worker_ttl_s = worker_ttl_s
        self._on_abandoned = on_abandoned
        self._on_forgotten = on_forgotten
        self._on_tick = on_tick
        self._observer = observer or Observer()
        self._held: dict[str, Claim] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embedq-leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; the claims stay held until their leases run out."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def hold(self, claims: Iterable[Claim]) -> None:
        with self._lock:
            self._held.update((claim.execution_id, claim) for claim in claims)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def is_running(self) -> bool:
        """False also once it was told to stop."""
        return self._thread.is_alive()

    def drop(self, claims: Iterable[Claim]) -> None:
        with self._lock:
            for claim in claims:
                self._held.pop(claim.execution_id, None)
                self._lost.discard(claim.execution_id)

    def held(self) -> list[Claim]:
        """In the order in which they were claimed."""
        with self._lock:
            return list(self._held.values())

    def is_lost(self, claim: Claim) -> bool:
        """Whether somebody canceled the job or took it over since; encoding it would be for nothing."""
        return claim.execution_id in self._lost

    def _run(self) -> None:
        every_s = self._store.lease_s / RENEWALS
        recover_every_s = min(RECOVER_EVERY_S, every_s)
        next_renewal = next_recovery = next_tick = renewed_at = time.monotonic()
        failing = False
        while not self._stop.is_set():
            now = time.monotonic()
            try:
                if now >= next_renewal:
                    self.renew()
                    next_renewal = now + every_s
                    self._observer.renewed(is_late=time.monotonic() - renewed_at > LATE * every_s)
                    renewed_at = time.monotonic()
                if now >= next_recovery:
                    self.recover()
                    next_recovery = now + recover_every_s
                failing = False
            except Exception as err:
                # Whatever it was: without this thread the worker would go on with leases that run out. Tried again
                # soon, nothing is lost until then.
                if not isinstance(err, redis.RedisError):
                    logger.exception("a round of leases failed")
                else:
                    logger.log(logging.DEBUG if failing else logging.WARNING, "leases could not be renewed: %s", err)
                failing = True
                next_renewal = next_recovery = now + every_s / RENEWALS
            if now >= next_tick:
                next_tick = now + TICK_EVERY_S
                self._tick()
            self._stop.wait(max(0.05, min(next_renewal, next_recovery, next_tick) - time.monotonic()))

    def _tick(self) -> None:
        """Whatever becomes of it, the leases are renewed in time."""
        try:
            self._on_tick()
        except Exception:
            logger.exception("what is done each second could not be done")

    def renew(self, claims: Sequence[Claim] | None = None) -> None:
        """One round: extends what is held, or only some of it, and learns what is lost."""
        renewed = self._store.renew(self.held() if claims is None else claims, self._worker_ttl_s)
        if not renewed.is_known:
            self._on_forgotten()
        newly_lost = self.lose(renewed.lost)
        if canceled := [claim for claim in newly_lost if claim in renewed.canceled]:
            self._observer.canceled(canceled)

    def lose(self, claims: Iterable[Claim]) -> list[Claim]:
        """Marks as lost those of the claims that are held; returns those that were not lost before."""
        with self._lock:
            newly_lost = [
                claim for claim in claims if claim.execution_id in self._held and claim.execution_id not in self._lost
            ]
            self._lost.update(claim.execution_id for claim in newly_lost)
        for claim in newly_lost:
            logger.debug("job %s is not this worker's any more", claim.job_id, extra={"job": claim.job_id})
        return newly_lost

    def recover(self) -> None:
        """One round over this worker's queues. A dead worker may have held more than one call takes back."""
        for queue in self._queues:
            for _ in range(RECOVER_CALLS):
                if self._recover(queue) < RECOVER_JOBS:
                    break

    def _recover(self, queue: str) -> int:
        """How many leases were taken back."""
        recovered = self._store.recover(queue)
        self._observer.recovered(queue, recovered)
        if recovered.retried or recovered.failed:
            logger.warning(
                "queue %s: the leases of dead workers ran out; %d jobs are tried again, %d failed",
                *(queue, recovered.retried, recovered.failed),
                extra={"event": "recovered_jobs", "queue": queue, "jobs": recovered.retried + recovered.failed},
            )
        if recovered.with_sequel:
            self._on_abandoned(queue, recovered.with_sequel)
        return recovered.taken
