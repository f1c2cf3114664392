"""What every exercise has: a Redis of its own that syncs every write, a client, a folder of logs, and workers' places.

Knows how a fleet is put together; what is done to it is the exercises'.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from embedq.producer import EmbedQueue, keys
from embedq.worker.redis_server import CONFIGURATION, RedisServer, free_port
from tests.ops.audit import Account, audit, await_ends
from tests.ops.finding import Finding
from tests.ops.load import Load
from tests.ops.places import Process, Restart, Served, until

P = TypeVar("P", bound=Process)

MODEL = "noop:768"
QUEUE = "embed"
WORKER = "tests.ops.stand_in"
#: A tenth of a second's work, so that a worker is never far from its next results.
MAX_BATCH_TOKENS = 1024
#: Seconds: short, as it is by leases that jobs of dead workers come back.
LEASE_S = 4.0
#: Beyond what ships: nothing that was acknowledged is lost with the server.
REDIS_SETTINGS = "\nappendfsync always\nmaxmemory 1gb\n"


class World:
    """A context manager: ends all that it started."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self._on_exit = ExitStack()

    def __enter__(self) -> Self:
        # A new one: journals and data of an earlier run would be taken for this one's.
        self.folder.mkdir(parents=True)
        configuration = self.folder / "redis.conf"
        configuration.write_text(CONFIGURATION.read_text() + REDIS_SETTINGS)
        self.redis = RedisServer(self.folder / "redis", port=0, durable=True, configuration=configuration)
        self._on_exit.enter_context(self.redis)
        self.queue = self._on_exit.enter_context(EmbedQueue(self.redis.url))
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._on_exit.close()

    def keep(self, place: P) -> P:
        """Starts it, and ends it with this world."""
        return self._on_exit.enter_context(place)

    def worker(self, name: str, *arguments: str, modules: Sequence[str] = (WORKER,)) -> Served:
        """Not started. modules: what is run, and what that runs."""
        port = free_port()
        command = self.worker_command("--metrics-port", str(port), *arguments, modules=modules)
        return Served(name, command, self.folder, port)

    def exporter(self) -> Served:
        """Not started."""
        port = free_port()
        command = [sys.executable, "-m", "embedq.worker.cli", "exporter", "--url", self.redis.url, "--port", str(port)]
        return Served("exporter", command, self.folder, port, ready_path="/metrics")

    def worker_command(self, *arguments: str, modules: Sequence[str] = (WORKER,)) -> list[str]:
        settings = ["--model", MODEL, "--lease-s", str(LEASE_S), "--max-batch-tokens", str(MAX_BATCH_TOKENS)]
        return [sys.executable, "-m", *modules, "worker", "--url", self.redis.url, *settings, *arguments]

    def fleet(self, size: int, *arguments: str) -> list[Served]:
        """Workers that are ready."""
        places = [self.keep(self.worker(f"worker-{place}", *arguments)) for place in range(size)]
        for place in places:
            place.await_ready()
        return places

    def load(self, name: str, per_s: float, **how: Any) -> Load:
        """how: as Load takes it."""
        return Load(self.redis.url, name, per_s, self.folder, **how)

    def now(self) -> float:
        """Seconds since 1970, by the server's clock."""
        seconds, microseconds = self.queue._redis.time()
        return float(seconds + microseconds / 1e6)

    def await_flow(self, load: Load, num_jobs: int = 50) -> None:
        """Until so many jobs that the load puts there from now on are finished."""
        before = len(load.ids())

        def is_flowing() -> bool:
            ids = load.ids()[before : before + num_jobs]
            return len(ids) == num_jobs and set(self.queue.statuses(ids).values()) == {"finished"}

        until(is_flowing, f"the load {load.name} does not flow")

    def num_parked(self) -> int:
        return int(self.queue._redis.zcard(keys.parked(QUEUE)))

    def settle(self, ids: Sequence[str]) -> Account:
        """What became of these jobs, once all have ended."""
        await_ends(self.queue, ids)
        return audit(self.queue, ids, MODEL)


def pause(seconds: float) -> None:
    """Lets the load flow."""
    time.sleep(seconds)


def tell_jobs(finding: Finding, account: Account) -> None:
    """The rows that every exercise with a load has."""
    finding.check("jobs accepted", f"{account.num_jobs:,}", "some", account.num_jobs > 0)
    finding.check_none("failed", [f"{job_id}: {reason}" for job_id, reason in account.failed.items()])
    finding.check_none("lost", account.lost)
    finding.check_none("with more results than one", account.duplicated)
    finding.check_none("with other vectors than theirs", account.wrong)


def tell_restart(finding: Finding, restart: Restart) -> None:
    what = f"{restart.name}: exit status, seconds to its end, seconds until the new one was ready"
    found = f"{restart.status}, {restart.left_s:.2f}, {restart.ready_s:.2f}"
    finding.check(what, found, "status 0", restart.status == 0)
