"""Fleets of up to 256 workers at one real Redis, their GPUs modelled on published figures of the H100.

`python -m tests.bench.fleet_simulation` measures what jobs cost the server, how calls wait and what an idle fleet
takes, and reckons from that what fleets need. Writes fleet.md and fleet.svg beside this file. `--quick` takes three
minutes and tells nothing but that it runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from embedq.model.machine import describe_machine
from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.bench import fleet_tables
from tests.bench.fleet_clients import stream
from tests.bench.fleet_idle import wake, watch_idle, watch_real
from tests.bench.fleet_jobs import DTYPES, Kind
from tests.bench.fleet_load import Paced, job_cost, pace, waiting
from tests.bench.fleet_model import JobCost
from tests.bench.fleet_plot import NoMatplotlibError, draw
from tests.bench.fleet_rates import TOKENS_PER_BATCH
from tests.bench.fleet_shards import largest_share, shard
from tests.bench.fleet_tables import MIDDLE, Found, median_cost

OUTPUT = Path(__file__).with_name("fleet.md")
MAX_WORKERS = 256
#: Texts of the jobs that are measured. Results of 60 fit into a smaller block of memory than those of 64.
TEXTS = (1, 8, 60, 64, 256)
#: Kinds that are measured with the append-only file too.
DURABLE = (Kind(1), Kind(1, "float16"), Kind(8, "float16"), Kind(64), Kind(64, "float16"), Kind(64, "int8"))
#: Kinds that one client reads.
STREAMED = (Kind(1), Kind(64), Kind(64, "float16"), Kind(64, "int8"))
#: Shares of the server that are asked for, and the jobs of it: cheap for the workers, which share a core.
LOADS, LOAD_KIND = (0.2, 0.4, 0.6, 0.75, 0.9), Kind(8, "float16")
SERVERS = (1, 2, 4)
LARGE_KIND = Kind(64)
#: Ids that are spread over servers by the hash alone.
SPREAD_IDS, SPREAD_SERVERS = 100_000, (2, 16, 64)

HEAD = """\
# Fleets of GPU workers at one Redis

`make fleet` writes this file and the picture. One private Redis {redis} on TCP, set up by the redis.conf that ships.
Workers are threads of one process that claim and publish as real ones do (`ClaimStore`, the Lua scripts, results of the
real size) and wait for as long as a GPU would take. Measured on {when} UTC; load averages (1, 5,
15 minutes) before it began {load}, at its end {load_after}. Costs are CPU time of the server's main thread, medians of
{rounds} rounds. Measured is this server on this machine; GPUs, networks and more hosts are reckoned.
"""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    rounds: int
    #: texts of a cost run, and jobs at most
    texts: int
    jobs: int
    #: of each paced run, and of each look at an idle fleet
    seconds: float
    idle_seconds: float
    wakes: int
    real_workers: int


WHOLE = Scale(rounds=5, texts=60_000, jobs=12_000, seconds=3.0, idle_seconds=10.0, wakes=7, real_workers=8)
QUICK = Scale(rounds=1, texts=6_000, jobs=2_000, seconds=0.5, idle_seconds=1.0, wakes=1, real_workers=1)


class Simulation:
    def __init__(self, scale: Scale, max_workers: int) -> None:
        self._scale = scale
        self._max_workers = max_workers
        self._console = Console(stderr=True)
        self._folder = Path()
        self.found = Found()

    def run(self) -> Found:
        with tempfile.TemporaryDirectory(prefix="eq-") as folder:
            self._folder = Path(folder)
            for part in self._parts():
                self._console.print(part.__doc__ or "", style="dim")
                part()
        return self.found

    def _parts(self) -> Iterator[Callable[[], None]]:
        yield from (self._costs, self._durable, self._stream, self._saturate, self._pace, self._wait)
        yield from (self._idle, self._shard)

    @contextmanager
    def _server(self, *, durable: bool = False) -> Iterator[RedisServer]:
        with (
            tempfile.TemporaryDirectory(prefix="eq-") as folder,
            RedisServer(Path(folder), port=0, durable=durable) as server,
        ):
            yield server

    def _workers(self, *numbers: int) -> list[int]:
        """Those that are not too many, and the most."""
        return sorted({number for number in numbers if number < self._max_workers} | {self._max_workers})

    def _number(self, kind: Kind) -> int:
        return max(32, min(self._scale.jobs, self._scale.texts // kind.texts))

    def _costs(self) -> None:
        """what a job costs"""
        kinds = [Kind(texts, precision) for precision in DTYPES for texts in TEXTS]
        self.found.costs = self._medians(kinds, durable=False)

    def _durable(self) -> None:
        """with the append-only file"""
        self.found.durable = self._medians(DURABLE, durable=True)

    def _medians(self, kinds: Sequence[Kind], *, durable: bool) -> list[JobCost]:
        costs: dict[Kind, list[JobCost]] = {kind: [] for kind in kinds}
        with self._server(durable=durable) as server:
            for _ in range(self._scale.rounds):
                for kind in kinds:
                    costs[kind].append(job_cost(server, kind, self._number(kind)))
        return [median_cost(some) for some in costs.values()]

    def _stream(self) -> None:
        """what a client takes"""
        with self._server() as server:
            self.found.streams = [stream(server, kind, self._scale.texts) for kind in STREAMED]

    def _saturate(self) -> None:
        """workers that nothing but the server holds back"""
        for kind in (Kind(1), LARGE_KIND):
            self._paced(self.found.saturated, kind, self._workers(1, 2, 4, 16, 64), cycle_s=0.0)

    def _pace(self) -> None:
        """H100s at their modelled pace"""
        cycle_s = TOKENS_PER_BATCH / MIDDLE.tokens_per_s
        for kind in (Kind(1), LARGE_KIND):
            self._paced(
                self.found.paced, kind, [number for number in (1, 2, 3, 4, 8) if number <= self._max_workers], cycle_s
            )

    def _paced(self, into: dict[int, list[Paced]], kind: Kind, numbers: list[int], cycle_s: float) -> None:
        most = 1e6 / self.found.cost(kind.texts, kind.precision).work_us
        with self._server() as server:
            into[kind.texts] = [pace(server, kind, number, cycle_s, self._scale.seconds, most) for number in numbers]

    def _wait(self) -> None:
        """how long calls take under load"""
        work_us = self.found.cost(LOAD_KIND.texts, LOAD_KIND.precision).work_us
        seconds = 2 * self._scale.seconds
        with self._server() as server:
            alone = pace(server, LOAD_KIND, 1, 0.05, seconds, 1e6 / work_us)
            self.found.waits = [
                waiting(server, LOAD_KIND, work_us, alone, self._max_workers, share, seconds) for share in LOADS
            ]

    def _idle(self) -> None:
        """a fleet with nothing to do"""
        scale = self._scale
        with self._server() as server:
            numbers = [0, *self._workers(1, scale.real_workers, 64)]
            self.found.idle = [watch_idle(server, number, scale.idle_seconds) for number in numbers]
            self.found.idle.append(watch_real(server, self._folder, scale.real_workers, scale.idle_seconds))
            for number in self._workers(1, 8, 64):
                self.found.wakes += wake(server, number, scale.wakes)

    def _shard(self) -> None:
        """several servers"""
        for number in SERVERS:
            self.found.shards[number] = [
                shard(LARGE_KIND, self._number(LARGE_KIND), number) for _ in range(self._scale.rounds)
            ]
        self.found.largest_shares = {number: largest_share(SPREAD_IDS, number) for number in SPREAD_SERVERS}


def report(found: Found, head: str) -> str:
    parts = (
        fleet_tables.rates_text(),
        *(
            text(found)
            for text in (
                *(fleet_tables.costs_text, fleet_tables.clients_text),
                *(fleet_tables.saturation_text, fleet_tables.paced_text),
                *(fleet_tables.waits_text, fleet_tables.idle_text, fleet_tables.shards_text),
                *(fleet_tables.memory_text, fleet_tables.devices_text, fleet_tables.fleets_text),
                *(fleet_tables.sizing_text, fleet_tables.arithmetic_text),
            )
        ),
    )
    return "\n\n".join([head, *parts]) + "\n"


def head(scale: Scale, began: datetime, load: str) -> str:
    with (
        tempfile.TemporaryDirectory(prefix="eq-") as folder,
        RedisServer(Path(folder)) as server,
        connect(server.url) as client,
    ):
        version = client.info("server")["redis_version"]
    when = began.strftime("%Y-%m-%d %H:%M")
    text = HEAD.format(redis=version, when=when, load=load, load_after=load_averages(), rounds=scale.rounds)
    machine = describe_machine(torch.device("cpu")).lines()
    picture = f"![The main figures]({OUTPUT.with_suffix('.svg').name})"
    return "\n".join([text, *(f"- {line}" for line in machine), "", picture])


def load_averages() -> str:
    return ", ".join(f"{load:.1f}" for load in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=MAX_WORKERS, help="of the largest fleet (default 256)")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the tables go; the picture goes beside them")
    arguments = parser.parse_args()
    if not 1 <= arguments.workers <= 4 * MAX_WORKERS:
        parser.error(f"--workers must be 1 to {4 * MAX_WORKERS}, not {arguments.workers}")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    scale = QUICK if arguments.quick else WHOLE
    began, load = datetime.now(UTC), load_averages()
    try:
        found = Simulation(scale, arguments.workers).run()
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    text = report(found, head(scale, began, load))
    arguments.output.write_text(text)
    print(text)
    try:
        draw(found, arguments.output.with_suffix(".svg"))
    except NoMatplotlibError as err:
        print(err, file=sys.stderr)


if __name__ == "__main__":
    main()
