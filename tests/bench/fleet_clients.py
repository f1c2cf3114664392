"""What the other side takes: one `embed_stream`, which enqueues, reads and decodes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from embedq.producer import EmbedQueue
from embedq.worker.redis_server import RedisServer
from tests.bench import fleet_jobs
from tests.bench.fleet_jobs import Kind
from tests.bench.fleet_load import COST_WORKERS, batch_jobs
from tests.bench.fleet_workers import SimulatedFleet, SimulatedWorker

#: Seconds of a micro-batch of the simulated devices: they are not to burn the reader's CPU by looking for jobs.
CYCLE_S = 0.01
WINDOW_TEXTS = 65_536


@dataclass(frozen=True, slots=True)
class Streamed:
    kind: Kind
    #: microseconds of the reading thread's CPU
    text_us: float

    @property
    def texts_per_s(self) -> float:
        """Of a client that does nothing else."""
        return 1e6 / self.text_us


def stream(server: RedisServer, kind: Kind, num_texts: int) -> Streamed:
    """Vectors are decoded and dropped; no more texts than fill whole jobs. Raises RuntimeError if one is missing."""
    texts = fleet_jobs.texts(num_texts - num_texts % kind.texts)
    payload = fleet_jobs.result(kind)
    workers = [
        SimulatedWorker(server.url, f"simulated-{place}", kind, payload, batch_jobs(kind), CYCLE_S)
        for place in range(COST_WORKERS)
    ]
    with EmbedQueue(server.url) as queue, SimulatedFleet(workers):
        before = time.thread_time()
        items = queue.embed_stream(texts, precision=kind.precision, texts_per_job=kind.texts, window=WINDOW_TEXTS)
        num_read = sum(len(item.vector) > 0 for item in items)
        took_s = time.thread_time() - before
    if num_read != len(texts):
        raise RuntimeError(f"{len(texts) - num_read} of {len(texts)} texts have no vector")
    return Streamed(kind, took_s / len(texts) * 1e6)
