"""The same jobs on several servers: how evenly they are spread, and what each server computes."""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from embedq.producer import EmbedQueue, requests
from embedq.producer.connection import connect
from embedq.producer.rendezvous import Rendezvous
from embedq.worker.redis_server import RedisServer
from tests.bench import fleet_jobs
from tests.bench.fleet_jobs import Kind
from tests.bench.fleet_load import COST_WORKERS, work_off
from tests.bench.fleet_meters import metered


@dataclass(frozen=True, slots=True)
class Sharded:
    """Jobs by their homes, worked off by workers of which each serves one server."""

    jobs: list[int]
    #: seconds of each server's main thread: claims and publications
    cpu_s: list[float]

    @property
    def largest_share(self) -> float:
        """Of the jobs of the fullest server to the mean."""
        return max(self.jobs) * len(self.jobs) / sum(self.jobs)

    @property
    def cpu_us(self) -> float:
        """Microseconds a job, all servers together."""
        return sum(self.cpu_s) / sum(self.jobs) * 1e6


def shard(kind: Kind, number: int, num_servers: int) -> Sharded:
    with tempfile.TemporaryDirectory(prefix="eq-") as folder, ExitStack() as stack:
        servers = {
            f"shard-{place}": stack.enter_context(RedisServer(Path(folder) / str(place), port=0))
            for place in range(num_servers)
        }
        parts = Rendezvous(servers).split(fleet_jobs.jobs(kind, number), key=lambda one: one.job_id)
        for name, some in parts.items():
            with EmbedQueue(servers[name].url) as queue:
                fleet_jobs.enqueue(queue, some)
        meters = [stack.enter_context(metered(stack.enter_context(connect(server.url)))) for server in servers.values()]
        work_off([server.url for server in servers.values()], kind, max(COST_WORKERS, num_servers))
        stack.pop_all().close()
    return Sharded([len(parts[name]) for name in servers], [found.meter.cpu_s for found in meters])


def largest_share(num_jobs: int, num_servers: int) -> float:
    """Of the fullest of many servers to the mean, by the hash alone."""
    homes = Rendezvous([f"shard-{place}" for place in range(num_servers)])
    counts = Counter(homes.home(job_id) for job_id in requests.fresh_ids(num_jobs))
    return max(counts.values()) * num_servers / num_jobs
