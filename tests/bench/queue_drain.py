"""Drains: how fast each system works off jobs that are waiting, and what that costs it and the server.

Rates are without start-up: from the last look at the server that found every job waiting to the first one that found
every result, looks being LOOK_EVERY_S apart, the same for all systems.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.bench.latency_proxy import HOST, LatencyProxy
from tests.bench.queue_contenders import RESULTS_DATABASE, Contender, Progress
from tests.bench.queue_processes import Bench, Producer, WorkerProcess

T = TypeVar("T")

LOOK_EVERY_S = 0.005
#: Seconds after which a drain counts as stuck.
DRAIN_TIMEOUT_S = 120.0
KEYS_PER_CALL = 1000


@dataclass(frozen=True, slots=True)
class Drained:
    """One run; all figures are of the time between the two looks."""

    num_jobs: int
    num_texts: int
    seconds: float
    #: of the worker's process and its children
    worker_cpu_s: float
    #: of the server
    redis_cpu_s: float
    #: that the server executed, those inside scripts included
    num_commands: int
    #: 0 without a proxy, which counts them
    num_round_trips: int
    #: what the worker wrote, to its end
    log: str

    @property
    def jobs_per_s(self) -> float:
        return self.num_jobs / self.seconds

    @property
    def texts_per_s(self) -> float:
        return self.num_texts / self.seconds

    @property
    def worker_us(self) -> float:
        """Microseconds of CPU a job."""
        return self.worker_cpu_s / self.num_jobs * 1e6

    @property
    def redis_us(self) -> float:
        return self.redis_cpu_s / self.num_jobs * 1e6

    @property
    def commands_per_job(self) -> float:
        return self.num_commands / self.num_jobs

    @property
    def round_trips_per_job(self) -> float:
        return self.num_round_trips / self.num_jobs


@dataclass(frozen=True, slots=True)
class _Meters:
    at_s: float
    worker_cpu_s: float
    redis_cpu_s: float
    num_commands: int
    num_round_trips: int


class Site:
    """One server, looked at from outside. `bench` says how the systems are started."""

    def __init__(self, bench: Bench, server: RedisServer) -> None:
        self.bench = bench
        self.server = server
        self._clients: dict[int, Any] = {
            database: connect(f"redis://{HOST}:{server.port}/{database}") for database in (0, RESULTS_DATABASE)
        }
        #: keys and their values with all jobs enqueued, by system, jobs and texts a job
        self._enqueued: dict[tuple[str, int, int], list[tuple[bytes, bytes]]] = {}
        #: commands of ours, which the server counts too
        self._own_commands = 0

    def empty(self) -> None:
        self._clients[0].flushall()

    def url(self, proxy: LatencyProxy | None = None) -> str:
        return self.server.url if proxy is None else f"redis://{HOST}:{proxy.port}/0"

    def drain(
        self,
        contender: Contender,
        producer: Producer,
        num_jobs: int,
        texts_per_job: int = 1,
        proxy: LatencyProxy | None = None,
    ) -> Drained:
        """Raises QueuePeerError where the worker gets nowhere."""
        self._put_jobs(contender, producer, num_jobs, texts_per_job)
        with WorkerProcess(self.bench, contender, self.url(proxy)) as worker:
            before = self._last_untouched(contender, worker, num_jobs, proxy)
            while self.look(contender, num_jobs).num_done < num_jobs:
                _pause(worker, before.at_s)
            after = self._meters(worker, proxy)
        return Drained(
            num_jobs=num_jobs,
            num_texts=num_jobs * texts_per_job,
            seconds=after.at_s - before.at_s,
            worker_cpu_s=after.worker_cpu_s - before.worker_cpu_s,
            redis_cpu_s=after.redis_cpu_s - before.redis_cpu_s,
            num_commands=after.num_commands - before.num_commands,
            num_round_trips=after.num_round_trips - before.num_round_trips,
            log=worker.log(),
        )

    def _put_jobs(self, contender: Contender, producer: Producer, num_jobs: int, texts_per_job: int) -> None:
        """As the producer enqueues them; again the second time, from what the server had then."""
        self.empty()
        client = self._clients[0]
        this = (contender.system, num_jobs, texts_per_job)
        if this in self._enqueued:
            for some in _slices(self._enqueued[this], KEYS_PER_CALL):
                with client.pipeline(transaction=False) as pipeline:
                    for key, value in some:
                        pipeline.restore(key, 0, value)
                    pipeline.execute()
            return
        producer.enqueue(num_jobs, texts_per_job, many=contender.is_ours)
        self._enqueued[this] = [(key, client.dump(key)) for key in client.scan_iter(count=KEYS_PER_CALL)]

    def _last_untouched(
        self, contender: Contender, worker: WorkerProcess, num_jobs: int, proxy: LatencyProxy | None
    ) -> _Meters:
        """The meters when all jobs were waiting for the last time."""
        meters = self._meters(worker, proxy)
        began_at = meters.at_s
        while True:
            candidate = self._meters(worker, proxy)
            if not self.look(contender, num_jobs).is_untouched:
                return meters
            meters = candidate
            _pause(worker, began_at)

    def look(self, contender: Contender, num_jobs: int) -> Progress:
        answers = [
            int(self._clients[database].execute_command(*command)) for database, command in contender.look.commands
        ]
        self._own_commands += len(answers)
        return contender.look.read(answers, num_jobs)

    def redis_cpu_s(self) -> float:
        """What the server has computed so far."""
        told = self._clients[0].info("cpu")
        self._own_commands += 1
        return float(told["used_cpu_user"] + told["used_cpu_sys"])

    def _meters(self, worker: WorkerProcess, proxy: LatencyProxy | None) -> _Meters:
        redis_cpu_s, stats = self.redis_cpu_s(), self._clients[0].info("stats")
        self._own_commands += 1
        return _Meters(
            at_s=time.perf_counter(),
            worker_cpu_s=worker.cpu_s(),
            redis_cpu_s=redis_cpu_s,
            num_commands=stats["total_commands_processed"] - self._own_commands,
            num_round_trips=0 if proxy is None else proxy.num_round_trips(),
        )


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _pause(worker: WorkerProcess, began_at: float) -> None:
    worker.check()
    if time.perf_counter() - began_at > DRAIN_TIMEOUT_S:
        raise worker.stuck(f"not done after {DRAIN_TIMEOUT_S:g} s")
    time.sleep(LOOK_EVERY_S)
