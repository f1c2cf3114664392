"""A worker with nothing to do: what waiting costs, and how soon one job is done."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.bench.queue_contenders import Contender
from tests.bench.queue_drain import Site
from tests.bench.queue_processes import Producer, WorkerProcess

#: Seconds for which an idle worker's CPU is counted.
WATCH_S = 2.0
#: Jobs before that, until which a worker is loaded.
WARM_UP_JOBS = 2
NUM_JOBS = 12


@dataclass(frozen=True, slots=True)
class Idle:
    #: share of one core that the idle worker takes
    worker_cpu: float
    #: share of one core that the server takes meanwhile, beyond what it takes without a worker
    redis_cpu: float
    #: of each job, from enqueueing to the result
    latencies_s: list[float]


def idle(site: Site, contender: Contender, producer: Producer, redis_alone_cpu: float) -> Idle:
    site.empty()
    with WorkerProcess(site.bench, contender, site.url()) as worker:
        producer.alone_s(WARM_UP_JOBS)
        worker_before, redis_before, began_at = worker.cpu_s(), site.redis_cpu_s(), time.perf_counter()
        time.sleep(WATCH_S)
        worker.check()
        worker_after, redis_after, took_s = worker.cpu_s(), site.redis_cpu_s(), time.perf_counter() - began_at
        return Idle(
            (worker_after - worker_before) / took_s,
            (redis_after - redis_before) / took_s - redis_alone_cpu,
            producer.alone_s(NUM_JOBS),
        )


def redis_alone_cpu(site: Site) -> float:
    """Share of one core that the server takes with nobody there."""
    before, began_at = site.redis_cpu_s(), time.perf_counter()
    time.sleep(WATCH_S)
    return (site.redis_cpu_s() - before) / (time.perf_counter() - began_at)
