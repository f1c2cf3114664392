"""How fast jobs come and go, from one look at a fleet after the other. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from embedq.producer.fleet import FleetInfo, QueueInfo

#: Seconds over which rates are averaged, about.
WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class QueueRates:
    """Jobs per second of one queue."""

    enqueued: float
    #: finished or failed
    ended: float


class FleetRates:
    """Remembers the looks of the last WINDOW_S."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, FleetInfo]] = deque()

    def add(self, seen: FleetInfo, now_s: float) -> dict[str, QueueRates]:
        """One more look, at a second of any steady clock. Rates by queue; none after the first look."""
        self._looks.append((now_s, seen))
        while len(self._looks) > 2 and now_s - self._looks[1][0] >= WINDOW_S:
            self._looks.popleft()
        then_s, before = self._looks[0]
        passed_s = now_s - then_s
        if passed_s <= 0:
            return {}
        queues = {queue.name: queue for queue in before.queues}
        return {
            queue.name: _rates(queue, queues[queue.name], _worked_off(queue.name, before, seen), passed_s)
            for queue in seen.queues
            if queue.name in queues
        }


def _rates(now: QueueInfo, then: QueueInfo, worked_off: int | None, passed_s: float) -> QueueRates:
    # Without the workers' word: what is kept of ended jobs, which shrinks when they expire.
    ended = max(0, _kept(now) - _kept(then)) if worked_off is None else worked_off
    return QueueRates(enqueued=max(0, _open(now) - _open(then) + ended) / passed_s, ended=ended / passed_s)


def _open(queue: QueueInfo) -> int:
    return queue.queued + queue.started + queue.scheduled + queue.deferred + queue.parked


def _kept(queue: QueueInfo) -> int:
    return queue.finished + queue.failed


def _worked_off(queue: str, before: FleetInfo, seen: FleetInfo) -> int | None:
    """Jobs that the queue's workers have done in between; None where one of them serves other queues, too."""
    serving = [worker for worker in seen.workers if queue in worker.queues]
    if not serving or any(len(worker.queues) > 1 for worker in serving):
        return None
    then = {worker.name: worker.jobs_done + worker.jobs_failed for worker in before.workers}
    return sum(max(0, worker.jobs_done + worker.jobs_failed - then.get(worker.name, 0)) for worker in serving)
