"""What a job takes of Redis' memory, waiting and finished: its hash, its result and its places in registries."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from embedq.producer import EmbedQueue
from embedq.producer.connection import connect
from embedq.producer.options import Precision
from embedq.worker import EmbedWorker, WorkerSettings
from embedq.worker.redis_server import RedisServer
from tests.conftest import redis_binaries

MODEL = "noop:768"
NUM_JOBS = 5000
PRECISIONS: tuple[Precision, ...] = ("float32", "float16")
#: Seconds in which Redis gives back the buffers of closed connections.
SETTLE_S = 0.3


@dataclass(frozen=True, slots=True)
class JobBytes:
    queued: float
    finished: float


def installed_servers() -> dict[str, str]:
    """Binaries by version and allocator, where both the embedded one and one on PATH are there."""
    found = {}
    for binary in redis_binaries():
        with tempfile.TemporaryDirectory(prefix="eq-") as folder, RedisServer(Path(folder), binary=binary) as server:
            with connect(server.url) as client:
                told = client.info()
            found[f"{told['redis_version']} ({told['mem_allocator']})"] = binary
    return found


def job_bytes(binary: str, configuration: Path | None, precision: Precision, num_jobs: int = NUM_JOBS) -> JobBytes:
    """Growth of used memory a job, over many jobs of one short text each on a server of their own.

    Without a `configuration` the server has its own defaults.
    """
    with (
        tempfile.TemporaryDirectory(prefix="eq-") as folder,
        RedisServer(Path(folder), binary=binary, configuration=configuration) as server,
    ):
        # One job first: scripts and registries are there once, however many jobs there are.
        _enqueue(server, 1, precision)
        _drain(server)
        empty = _used_bytes(server)
        _enqueue(server, num_jobs, precision)
        queued = _used_bytes(server)
        _drain(server)
        return JobBytes((queued - empty) / num_jobs, (_used_bytes(server) - empty) / num_jobs)


def _enqueue(server: RedisServer, number: int, precision: Precision) -> None:
    with EmbedQueue(server.url) as queue:
        queue.enqueue_many([f"the short text number {place}" for place in range(number)], precision=precision)


def _drain(server: RedisServer) -> None:
    with connect(server.url) as client:
        worker = EmbedWorker(["embed"], connection=client, settings=WorkerSettings(model=MODEL))
        worker.work(burst=True, logging_level="WARNING")


def _used_bytes(server: RedisServer) -> int:
    """Without what connections and the append-only file's buffer take at the moment."""
    time.sleep(SETTLE_S)
    with connect(server.url) as client:
        told = client.info("memory")
    return int(told["used_memory"] - told["mem_clients_normal"] - told["mem_aof_buffer"])
