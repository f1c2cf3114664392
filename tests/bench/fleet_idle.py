"""A fleet that has nothing to do: what it costs the server to be there, and what happens when one job comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from embedq.producer import EmbedQueue, keys
from embedq.producer.connection import connect
from embedq.worker.callbacks import CallbackThread
from embedq.worker.chores import Chores
from embedq.worker.claims import ClaimStore, Outcome
from embedq.worker.leases import LeaseKeeper
from embedq.worker.promotion import Promoter
from embedq.worker.redis_server import RedisServer
from embedq.worker.sequels import Sequels
from embedq.worker.waiting import QueueWaiter
from embedq.worker.worker import IDLE_S
from tests.bench import fleet_jobs
from tests.bench.fleet_jobs import QUEUE, Kind
from tests.bench.fleet_load import batch_jobs
from tests.bench.fleet_meters import Meter, metered, used_bytes
from tests.bench.fleet_workers import LEASE_S, MANY_BYTES
from tests.bench.queue_contenders import CONTENDERS
from tests.bench.queue_processes import Bench, WorkerProcess
from tests.conftest import until

#: Seconds until a worker without a sign of life counts as dead, as `rq worker` has it.
WORKER_TTL_S = 480
#: Seconds after a push in which whoever wakes has woken, on a busy machine too.
WAKE_S = 0.8
ONE_TEXT = Kind(1)


class IdleWorker:
    """What an idle worker does to its server, by the parts that a real one is made of, without process and device.

    A context manager. It does the jobs that come, at once.
    """

    def __init__(self, url: str, name: str, payload: bytes) -> None:
        self._client: Any = connect(url)
        self._name, self._payload = name, payload
        self._store = ClaimStore(self._client, name, LEASE_S)
        self._waiter = QueueWaiter(self._client, [keys.queue(QUEUE)])
        self._leases = LeaseKeeper(
            self._store, [QUEUE], WORKER_TTL_S, on_abandoned=lambda *_: None, on_forgotten=lambda: None
        )
        self._promoter = Promoter(self._client, [QUEUE])
        self._sequels = Sequels(self._client, [QUEUE], CallbackThread(()))
        self._chores = Chores(self._tick)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._is_stopping = False
        #: moments at which it was woken, and at which it got a job
        self.woken_at: list[float] = []
        self.claimed_at: list[float] = []

    def __enter__(self) -> Self:
        self._client.hset(keys.worker(self._name), mapping={"birth": "2026-01-01T00:00:00.000000Z", "queues": QUEUE})
        self._client.sadd(keys.WORKERS, keys.worker(self._name))
        self._channel = self._client.pubsub()
        self._channel.subscribe(keys.worker_channel(self._name), keys.cancel_channel(self._name))
        self._leases.start()
        self._chores.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ask_to_stop()
        self._thread.join()
        self._leases.stop()
        self._chores.stop()
        self._waiter.close()
        self._channel.close()
        self._client.close()

    def ask_to_stop(self) -> None:
        self._is_stopping = True
        self._waiter.wake()

    def _tick(self) -> None:
        self._promoter.round()
        self._sequels.take_up()

    def _work(self) -> None:
        while not self._is_stopping:
            if self._waiter.wait(IDLE_S):
                self.woken_at.append(time.monotonic())
            claims = self._store.claim([QUEUE], batch_jobs(ONE_TEXT), MANY_BYTES).claims
            if claims:
                self.claimed_at.append(time.monotonic())
                self._store.publish([Outcome(claim, "finished", self._payload, 0.01) for claim in claims])


@contextmanager
def idle_fleet(server: RedisServer, num_workers: int) -> Iterator[list[IdleWorker]]:
    payload = fleet_jobs.result(ONE_TEXT)
    with ExitStack() as stack, connect(server.url) as client:
        workers = [
            stack.enter_context(IdleWorker(server.url, f"idle-{place}", payload)) for place in range(num_workers)
        ]
        # In the order of their beginning they would end one by one, each after its last wait.
        stack.callback(_ask_all_to_stop, workers)
        until(lambda: client.info("clients")["blocked_clients"] >= num_workers, timeout_s=60)
        yield workers


def _ask_all_to_stop(workers: Sequence[IdleWorker]) -> None:
    for worker in workers:
        worker.ask_to_stop()


@dataclass(frozen=True, slots=True)
class Idle:
    num_workers: int
    #: whether they are processes of `embedq worker`, rather than parts of it in this process
    are_real: bool
    connections: int
    #: of the server, for all of them together
    memory_bytes: int
    meter: Meter

    @property
    def commands_per_s(self) -> float:
        return self.meter.num_commands / self.meter.seconds


def watch_idle(server: RedisServer, num_workers: int, seconds: float) -> Idle:
    """Simulated workers."""
    with connect(server.url) as client:
        client.flushall()
        empty = used_with_clients(client)
        with idle_fleet(server, num_workers):
            return _watch(client, num_workers, seconds, empty, are_real=False)


def watch_real(server: RedisServer, logs: Path, num_workers: int, seconds: float) -> Idle:
    """Processes of the command that a fleet runs, with a stand-in for the model."""
    bench = Bench(Path(), logs)
    with connect(server.url) as client, ExitStack() as stack:
        client.flushall()
        empty = used_with_clients(client)
        for _ in range(num_workers):
            stack.enter_context(WorkerProcess(bench, CONTENDERS[0], server.url))
        until(lambda: client.info("clients")["blocked_clients"] >= num_workers, timeout_s=120)
        return _watch(client, num_workers, seconds, empty, are_real=True)


def _watch(client: Any, num_workers: int, seconds: float, empty: int, *, are_real: bool) -> Idle:
    time.sleep(1)  # until each has said that it is idle
    with metered(client) as found:
        time.sleep(seconds)
    connections = int(client.info("clients")["connected_clients"]) - 1
    return Idle(num_workers, are_real, connections, used_with_clients(client) - empty, found.meter)


def used_with_clients(client: Any) -> int:
    return used_bytes(client) + int(client.info("memory")["mem_clients_normal"])


@dataclass(frozen=True, slots=True)
class Wake:
    """One job of one text for a fleet that waits."""

    num_workers: int
    #: of them, how many the server woke
    num_woken: int
    #: of the server, beyond what the idle fleet takes in the same time
    cpu_s: float
    #: from before enqueueing to the claim
    claimed_after_s: float


def wake(server: RedisServer, num_workers: int, rounds: int) -> list[Wake]:
    found = []
    with connect(server.url) as client, EmbedQueue(connection=client) as queue:
        client.flushall()
        with idle_fleet(server, num_workers) as workers:
            fleet_jobs.enqueue(queue, fleet_jobs.jobs(ONE_TEXT, 1))
            time.sleep(WAKE_S)
            for number in range(rounds):
                with metered(client) as alone:
                    time.sleep(WAKE_S)
                for worker in workers:
                    worker.woken_at.clear()
                    worker.claimed_at.clear()
                began_at = time.monotonic()
                with metered(client) as woken:
                    fleet_jobs.enqueue(queue, fleet_jobs.jobs(ONE_TEXT, 1, seed=number))
                    time.sleep(WAKE_S)
                found.append(
                    Wake(
                        num_workers,
                        sum(bool(worker.woken_at) for worker in workers),
                        woken.meter.cpu_s - alone.meter.cpu_s,
                        min(moment for worker in workers for moment in worker.claimed_at) - began_at,
                    )
                )
    return found
