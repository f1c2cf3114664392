"""Latency under load: jobs come by chance at a share of what a system can do, whether it keeps up or not.

A job's latency is from the moment at which it was to come to the moment at which we hear of its result, by Redis'
keyspace notifications of its stream: the systems don't know that they are watched. For RQ's keys alone.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rq import Queue

from embedq.producer import EmbedQueue, keys
from embedq.producer.connection import connect
from tests.bench.queue_contenders import Contender
from tests.bench.queue_drain import Site
from tests.bench.queue_processes import WorkerProcess

SHARES = (0.1, 0.5, 0.9)
#: Seconds over which the jobs of one measurement come.
DURATION_S = 2.5
#: Jobs of the burst that tells what a system can do, for seconds of its drain.
BURST_S = 1.0
#: Results a second that are watched; of more jobs every so manieth.
WATCHED_PER_S = 1000
#: Jobs enqueued in one call at most.
CALL_JOBS = 500
TIMEOUT_S = 60.0
#: What a watched job's id begins with, and another's.
WATCHED, UNWATCHED = "watched-", "job-"
SEED = 7

#: Enqueues jobs of one text under these ids.
Enqueue = Callable[[Sequence[str]], object]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Latencies by share of the capacity, in the order in which the jobs came."""

    capacity: float
    latencies_s: dict[float, list[float]]


def loaded(site: Site, contender: Contender, drain_rate: float, shares: Sequence[float] = SHARES) -> Loaded:
    """`drain_rate` in jobs a second is a guess of the capacity, which is then measured with jobs coming in."""
    site.empty()
    client: Any = connect(site.url())
    enqueue = _enqueue(contender, client)
    client.config_set("notify-keyspace-events", "Ktg")  # streams, and keys that get a name
    try:
        with client, _Watcher(site.url()) as watcher, WorkerProcess(site.bench, contender, site.url()) as worker:
            # The worker is up once the first job is done.
            _run(watcher, enqueue, [0.0], worker, watch_every=1)
            burst = [0.0] * int(drain_rate * BURST_S)
            capacity = len(burst) / max(_run(watcher, enqueue, burst, worker, watch_every=1))
            return Loaded(
                capacity,
                {
                    share: _run(
                        watcher,
                        enqueue,
                        arrivals(share * capacity, DURATION_S),
                        worker,
                        watch_every=max(1, round(share * capacity / WATCHED_PER_S)),
                    )
                    for share in shares
                },
            )
    finally:
        with connect(site.url()) as again:
            again.config_set("notify-keyspace-events", "")


def arrivals(rate: float, duration_s: float) -> list[float]:
    """Seconds at which jobs come, a Poisson process; the same in each run. At least one."""
    chance = random.Random(SEED)
    found = [chance.expovariate(rate)]
    while found[-1] < duration_s:
        found.append(found[-1] + chance.expovariate(rate))
    return found


def _enqueue(contender: Contender, client: Any) -> Enqueue:
    if contender.system == "embedq":
        ours = EmbedQueue(connection=client)
        return lambda ids: ours.enqueue_many(["a text"] * len(ids), job_ids=ids)
    theirs = Queue("bench", connection=client)
    return lambda ids: theirs.enqueue_many(
        [Queue.prepare_data("stand_in.embed", (["a text"],), job_id=job_id, result_ttl=3600) for job_id in ids]
    )


def _run(
    watcher: _Watcher, enqueue: Enqueue, come_at_s: Sequence[float], worker: WorkerProcess, watch_every: int
) -> list[float]:
    """Latencies of the watched jobs. All that are due are enqueued in one call, like those of many users."""
    run = f"{time.monotonic_ns()}-"
    ids = [f"{WATCHED if place % watch_every == 0 else UNWATCHED}{run}{place}" for place in range(len(come_at_s))]
    began_at = time.perf_counter()
    sent = 0
    while sent < len(ids):
        now_s = time.perf_counter() - began_at
        due = sent
        while due < len(ids) and come_at_s[due] <= now_s and due - sent < CALL_JOBS:
            due += 1
        if due > sent:
            enqueue(ids[sent:due])
            sent = due
        else:
            time.sleep(come_at_s[sent] - now_s)
    watched = {job_id: at_s for job_id, at_s in zip(ids, come_at_s, strict=True) if job_id.startswith(WATCHED)}
    done_at = watcher.wait(watched, worker)
    return [done_at[job_id] - began_at - at_s for job_id, at_s in watched.items()]


class _Watcher:
    """Hears, on a thread of its own, when the result of a watched job is there."""

    def __init__(self, url: str) -> None:
        self._client = connect(url)
        self._pubsub: Any = self._client.pubsub(ignore_subscribe_messages=True)
        self._channel = "__keyspace@0__:" + keys.results("")
        #: by job id, as `perf_counter` tells
        self._done_at: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> _Watcher:
        self._pubsub.psubscribe(f"{self._channel}{WATCHED}*")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._pubsub.close()
        self._client.close()

    def wait(self, ids: Sequence[str] | dict[str, float], worker: WorkerProcess) -> dict[str, float]:
        """When each was done. Raises QueuePeerError if that takes too long."""
        give_up_at = time.perf_counter() + TIMEOUT_S
        while not all(job_id in self._done_at for job_id in ids):
            worker.check()
            if time.perf_counter() > give_up_at:
                raise worker.stuck(f"jobs are not done after {TIMEOUT_S:g} s")
            time.sleep(0.01)
        return {job_id: self._done_at[job_id] for job_id in ids}

    def _listen(self) -> None:
        while not self._is_over.is_set():
            if message := self._pubsub.get_message(timeout=0.1):
                job_id = message["channel"].decode().removeprefix(self._channel)
                self._done_at.setdefault(job_id, time.perf_counter())


def percentile_ms(latencies_s: Sequence[float], percent: int) -> float:
    """The smallest latency that so many percent do not exceed."""
    ordered = sorted(latencies_s)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] * 1000


def median_ms(latencies_s: Sequence[float]) -> float:
    return statistics.median(latencies_s) * 1000
