"""What jobs cost one server, how fast it goes when nothing holds it back, and how long calls take at a given load."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedq.producer import EmbedQueue
from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.bench import fleet_jobs
from tests.bench.fleet_jobs import Kind
from tests.bench.fleet_meters import Meter, metered, used_bytes
from tests.bench.fleet_model import Call, JobCost, wait_s
from tests.bench.fleet_rates import SHORT, texts_per_batch
from tests.bench.fleet_workers import SimulatedFleet, SimulatedWorker, Told

#: Workers that drain while costs are taken: enough for the server never to wait.
COST_WORKERS = 4
#: Seconds of a paced run that are not looked at, for devices to come out of step.
WARM_UP_S = 0.5
SEED = 7
#: Of the time in which a full server does one micro-batch of each worker; jobs beyond what it is thought to do.
TURN_SHARE, SPARE = 1.25, 1.6
#: Of the results that one run leaves in the server.
MAX_RESULT_BYTES = 5e9


def batch_jobs(kind: Kind) -> int:
    """Jobs of one micro-batch of short texts."""
    return max(1, texts_per_batch(SHORT.tokens) // kind.texts)


def work_off(urls: Sequence[str], kind: Kind, num_workers: int) -> None:
    """Until the queues are empty; nothing takes time but the calls. Of several servers each has its workers."""
    payload = fleet_jobs.result(kind)
    workers = [
        SimulatedWorker(urls[place % len(urls)], f"simulated-{place}", kind, payload, batch_jobs(kind))
        for place in range(num_workers)
    ]
    with SimulatedFleet(workers) as fleet:
        fleet.join()


def job_cost(server: RedisServer, kind: Kind, number: int) -> JobCost:
    """Of one kind, from enqueueing to deletion, each part by itself."""
    with connect(server.url) as client, EmbedQueue(connection=client) as queue:
        _warm_up(server.url, queue, kind)
        some = fleet_jobs.jobs(kind, number)
        empty = used_bytes(client)
        with metered(client) as enqueueing:
            fleet_jobs.enqueue(queue, some)
        queued = used_bytes(client)
        with metered(client) as working:
            work_off([server.url], kind, COST_WORKERS)
        finished = used_bytes(client)
        with metered(client) as reading:
            num_read = fleet_jobs.read_and_delete(client, [one.job_id for one in some])
        client.flushall()
    if num_read != number:
        raise RuntimeError(f"{number - num_read} of {number} jobs have no result")
    parts: list[Meter] = [enqueueing.meter, working.meter, reading.meter]
    return JobCost(
        kind.texts,
        kind.precision,
        enqueue_us=enqueueing.meter.cpu_s / number * 1e6,
        work_us=working.meter.cpu_s / number * 1e6,
        read_us=reading.meter.cpu_s / number * 1e6,
        bytes_in=sum(part.bytes_in for part in parts) / number,
        bytes_out=sum(part.bytes_out for part in parts) / number,
        queued_bytes=(queued - empty) / number,
        finished_bytes=(finished - empty) / number,
    )


def _warm_up(url: str, queue: EmbedQueue, kind: Kind) -> None:
    """Scripts are loaded, registries and the workers' keys are there."""
    fleet_jobs.enqueue(queue, fleet_jobs.jobs(kind, 2 * COST_WORKERS))
    work_off([url], kind, COST_WORKERS)


@dataclass(frozen=True, slots=True)
class Paced:
    """Workers whose devices set the pace, if they have any."""

    num_workers: int
    #: seconds of a micro-batch on the device; 0: nothing holds the workers back but the server
    cycle_s: float
    jobs_per_s: float
    #: what the server's main thread computed, of one core
    cpu_share: float
    #: means, from the call to its reply
    claim_s: float
    publish_s: float
    #: of the micro-batches, those that began late because the calls before took longer than the device
    late_share: float
    #: the slowest of a hundred calls of either kind
    slow_call_s: float

    @property
    def cpu_us(self) -> float:
        """Microseconds of the server's main thread a job: claim and publication."""
        return self.cpu_share / self.jobs_per_s * 1e6


def pace(
    server: RedisServer, kind: Kind, num_workers: int, cycle_s: float, seconds: float, most_jobs_per_s: float
) -> Paced:
    """Devices begin out of step, by chance. Jobs are there before, as many as will be done.

    most_jobs_per_s: about what the server can do. Where that is less than what is asked of it, the run is long enough
    for each worker to have its turn.
    """
    payload, chance, batch = fleet_jobs.result(kind), random.Random(SEED), batch_jobs(kind)
    wanted = num_workers * batch / cycle_s if cycle_s else math.inf
    turn_s = TURN_SHARE * num_workers * batch / most_jobs_per_s if wanted > most_jobs_per_s else 0.0
    warm_up_s, seconds = max(WARM_UP_S, turn_s), max(seconds, turn_s)
    number = SPARE * min(wanted, most_jobs_per_s) * (warm_up_s + seconds) + num_workers * batch
    with connect(server.url) as client, EmbedQueue(connection=client) as queue:
        _warm_up(server.url, queue, kind)
        fleet_jobs.enqueue(queue, fleet_jobs.jobs(kind, int(min(number, MAX_RESULT_BYTES / kind.vector_bytes))))
        workers = [
            SimulatedWorker(server.url, f"simulated-{place}", kind, payload, batch, cycle_s)
            for place in range(num_workers)
        ]
        with SimulatedFleet(workers, [chance.uniform(0, cycle_s) for _ in workers]):
            time.sleep(warm_up_s)
            before = [_so_far(worker.told) for worker in workers]
            with metered(client) as found:
                time.sleep(seconds)
            after = [_so_far(worker.told) for worker in workers]
        client.flushall()
    claims, publications, num_jobs, num_late = (
        [item for new in _news(workers, before, after) for item in new[part]] for part in range(4)
    )
    if not publications:
        raise RuntimeError(f"{num_workers} workers published nothing within {seconds:.1f} s")
    return Paced(
        num_workers,
        cycle_s,
        jobs_per_s=sum(num_jobs) / found.meter.seconds,
        cpu_share=found.meter.cpu_share,
        claim_s=statistics.fmean(claims),
        publish_s=statistics.fmean(publications),
        late_share=min(1.0, sum(num_late) / len(claims)),
        slow_call_s=sorted([*claims, *publications])[int(0.99 * (len(claims) + len(publications)))],
    )


def _so_far(told: Told) -> tuple[int, int, int, int]:
    return len(told.claims_s), len(told.publications_s), told.num_jobs, told.num_late


def _news(
    workers: Sequence[SimulatedWorker], before: Sequence[Any], after: Sequence[Any]
) -> Iterator[tuple[list[float], list[float], list[int], list[int]]]:
    for worker, first, last in zip(workers, before, after, strict=True):
        told = worker.told
        yield (
            told.claims_s[first[0] : last[0]],
            told.publications_s[first[1] : last[1]],
            [last[2] - first[2]],
            [last[3] - first[3]],
        )


@dataclass(frozen=True, slots=True)
class Waiting:
    """One load of a server, and what the model says of it."""

    measured: Paced
    #: means of both kinds of calls together
    measured_s: float
    predicted_s: float


def waiting(
    server: RedisServer, kind: Kind, work_us: float, alone: Paced, num_workers: int, share: float, seconds: float
) -> Waiting:
    """`num_workers` whose devices are so slow that together they ask for a share of the server.

    alone: one worker at a server that has nothing else to do, whose calls wait for nobody. What the model says is for
    the share that the server's thread was busy in fact.
    """
    cycle_s = num_workers * work_us * batch_jobs(kind) / 1e6 / share
    found = pace(server, kind, num_workers, cycle_s, seconds, 1e6 / work_us)
    alone_s = alone.claim_s + alone.publish_s
    per_s = found.jobs_per_s / batch_jobs(kind)
    calls = [Call(per_s, found.cpu_share / per_s * part / alone_s) for part in (alone.claim_s, alone.publish_s)]
    return Waiting(found, (found.claim_s + found.publish_s) / 2, alone_s / 2 + wait_s(calls))
