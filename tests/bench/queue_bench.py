"""The queue beside its peers: stock RQ, huey, dramatiq, arq, celery and celery-batches, on one private Redis.

Every system drains in one process of its own and stores the same vectors; what computes them costs next to nothing,
so that what is measured is the queue. Prints the tables and writes them to queue.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from embedq.model.bench_report import table
from embedq.model.machine import describe_machine
from embedq.producer.connection import connect
from embedq.worker.redis_server import CONFIGURATION, RedisServer
from tests.bench import measure
from tests.bench.latency_proxy import HOST, LatencyProxy
from tests.bench.peer_environment import queue_peer_environment
from tests.bench.queue_accounts import num_micro_batches
from tests.bench.queue_contenders import CONTENDERS, Contender
from tests.bench.queue_drain import LOOK_EVERY_S, Drained, Site
from tests.bench.queue_idle import NUM_JOBS, WATCH_S, idle, redis_alone_cpu
from tests.bench.queue_load import DURATION_S, SHARES, loaded, median_ms, percentile_ms
from tests.bench.queue_memory import NUM_JOBS as NUM_MEMORY_JOBS
from tests.bench.queue_memory import PRECISIONS, installed_servers, job_bytes
from tests.bench.queue_processes import Bench, Producer
from tests.bench.queue_tables import OURS, STOCK, costs_table, median, rates_table, stages_text, trips_table

OUTPUT = Path(__file__).with_name("queue.md")
#: Rounds at most of the peers but SimpleWorker; and of all systems in the tables that are not the main ones.
PEER_ROUNDS, SIDE_ROUNDS = 3, 2
TEXTS_PER_JOB = (1, 8, 64)
ENQUEUED_SINGLY = 300
ENQUEUED_AT_ONCE = 4000
#: Seconds of delay in each direction of the slow network.
DELAY_S = 0.001
PINGS = 100
#: Jobs of two runs, the second of which has more steady state.
STEADY_JOBS = (4000, 24_000)
#: Systems that enqueue as another of the list does.
SAME_PRODUCER = ("rq-forking", "celery-batches")
#: The systems whose latency is measured under load.
LOADED = ("embedq", "rq-simple")

HEAD = """\
# The queue beside its peers

`make bench` writes this file. One private Redis {redis}, set up by the redis.conf that ships, without its append-only
file; all connect by TCP. Every system drains in one process of its own and stores 3,072 bytes a text (768 float32): the
peers by their cheapest serializer, pickle or raw; embedq with all that its results tell. Medians of rounds in which
all systems took turns: {rounds} for enqueueing and for embedq and SimpleWorker with one text a job, {peers} for the
others with one text a job, {side} elsewhere. `embedq times` is embedq's figure over the row's.
"""


class QueueBench:
    def __init__(self, rounds: int, stack: ExitStack) -> None:
        self._console = Console(stderr=True)
        self._rounds = rounds
        environment = queue_peer_environment(self._console)
        bench = Bench(environment.python, environment.logs)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eq-")))
        self._server = stack.enter_context(RedisServer(folder, port=0))
        self._site = Site(bench, self._server)
        self._producers: dict[str, Producer] = {}
        for contender in CONTENDERS:
            producer = Producer(bench, contender, self._server.url)
            stack.callback(producer.close)
            self._producers[contender.system] = producer
        #: jobs a second of the drains of one text a job, where that part ran
        self._drain_rates: dict[str, float] = {}

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)

    def _at_most(self, rounds: int) -> int:
        return min(self._rounds, rounds)

    def _drain_rounds(self, texts_per_job: int) -> dict[str, int]:
        if texts_per_job > 1:
            return {contender.system: self._at_most(SIDE_ROUNDS) for contender in CONTENDERS}
        return {
            contender.system: self._rounds if contender.is_main else self._at_most(PEER_ROUNDS)
            for contender in CONTENDERS
        }

    def head(self) -> str:
        with connect(self._server.url) as client:
            redis = client.info("server")["redis_version"]
        text = HEAD.format(
            redis=redis, rounds=self._rounds, peers=self._at_most(PEER_ROUNDS), side=self._at_most(SIDE_ROUNDS)
        )
        machine = describe_machine(torch.device("cpu")).lines()
        versions = {
            contender.name: ", ".join(
                f"{name} {number}" for name, number in self._producers[contender.system].versions.items()
            )
            for contender in CONTENDERS
        }
        return "\n".join([text, *(f"- {line}" for line in machine), *(f"- {n}: {v}" for n, v in versions.items())])

    def enqueue(self) -> str:
        self._say("enqueue")
        singly = [contender for contender in CONTENDERS if contender.system not in SAME_PRODUCER]
        at_once = [contender for contender in CONTENDERS if contender.system in (OURS, STOCK)]
        parts = [
            self._enqueued("one call a job", "jobs/s", singly, ENQUEUED_SINGLY, many=False),
            self._enqueued("one call for all", "jobs/s", at_once, ENQUEUED_AT_ONCE, many=True),
        ]
        return "\n\n".join(["## Enqueue, one text a job", *parts])

    def _enqueued(self, title: str, unit: str, contenders: Sequence[Contender], number: int, *, many: bool) -> str:
        def rate(contender: Contender) -> float:
            self._site.empty()
            return number / self._producers[contender.system].enqueue(number, many=many)

        found = measure.take_turns(
            {contender.system: partial(rate, contender) for contender in contenders},
            {contender.system: self._rounds for contender in contenders},
        )
        names = {contender.system: contender.name.removesuffix(" worker") for contender in contenders}
        names[STOCK] = "rq"
        return rates_table(f"{title}, {unit}", names, found)

    def drain(self) -> str:
        parts = [
            "## Drain\n\n"
            "Jobs are waiting when the worker starts. Without its start-up: from the last look that found every job"
            f" waiting to the first that found every result, {LOOK_EVERY_S * 1000:.0f} ms apart. CPU and commands are"
            " of the same time; commands inside scripts count too."
        ]
        for texts_per_job in TEXTS_PER_JOB:
            found = self._drained(texts_per_job)
            names = {contender.system: contender.name for contender in CONTENDERS}
            title = "1 text a job, jobs/s" if texts_per_job == 1 else f"{texts_per_job} texts a job, texts/s"
            parts.append(
                rates_table(title, names, {name: [one.texts_per_s for one in all_] for name, all_ in found.items()})
            )
            parts += [costs_table(texts_per_job, names, found), stages_text(found[OURS])]
            if texts_per_job == 1:
                self._drain_rates = {name: median(all_, lambda one: one.jobs_per_s) for name, all_ in found.items()}
        return "\n\n".join(parts)

    def _drained(self, texts_per_job: int) -> dict[str, list[Drained]]:
        self._say(f"drain, {texts_per_job} texts a job")
        return measure.take_turns(
            {
                contender.system: partial(
                    self._site.drain,
                    contender,
                    self._producers[contender.system],
                    contender.num_jobs[texts_per_job],
                    texts_per_job,
                )
                for contender in CONTENDERS
            },
            self._drain_rounds(texts_per_job),
        )

    def network(self) -> str:
        """The same drain with a round trip of 2 ms, and what every system asks of the network."""
        self._say("drain through a slow network")
        ours = CONTENDERS[0]
        with LatencyProxy(self._port, DELAY_S) as slow, LatencyProxy(self._port, 0.0) as fast:
            candidates: dict[str, Callable[[], Drained]] = {
                contender.system: partial(self._distant, contender, slow) for contender in CONTENDERS
            }
            candidates["direct"] = partial(self._distant, ours, None)
            candidates["fast"] = partial(self._distant, ours, fast)
            found = measure.take_turns(candidates, dict.fromkeys(candidates, self._at_most(SIDE_ROUNDS)))
            pings = {
                "without the proxy": self._port,
                "through it without delay": fast.port,
                "with 2 ms": slow.port,
            }
            told = ", ".join(f"{_ping_ms(port):.2f} ms {how}" for how, port in pings.items())
            steady = self._steady_round_trips(fast)
        names = {contender.system: contender.name for contender in CONTENDERS}
        names |= {"direct": "embedq worker, no proxy", "fast": "embedq worker, proxy without delay"}
        rates = {name: [one.jobs_per_s for one in all_] for name, all_ in found.items()}
        text = (
            "## Drain with 2 ms of round-trip time\n\n"
            "The worker reaches Redis through a proxy, a process of its own that delays each direction by 1 ms."
            f" A PING takes {told}. Round trips are counted there: how often a client sends"
            " something after it was answered, however much it sends in one go. Commands are what the server counts,"
            " those inside scripts included."
        )
        return "\n\n".join([text, rates_table("1 text a job, jobs/s", names, rates), trips_table(names, found), steady])

    @property
    def _port(self) -> int:
        assert self._server.port is not None
        return self._server.port

    def _distant(self, contender: Contender, proxy: LatencyProxy | None) -> Drained:
        producer = self._producers[contender.system]
        return self._site.drain(contender, producer, contender.num_distant_jobs, proxy=proxy)

    def _steady_round_trips(self, proxy: LatencyProxy) -> str:
        """What more jobs take: a worker's beginning and end are in both runs, and cancel out."""
        ours, counts = CONTENDERS[0], []
        for number in STEADY_JOBS:
            before = proxy.num_round_trips()
            self._site.drain(ours, self._producers[OURS], number, proxy=proxy)
            with connect(self._server.url) as client:
                counts.append((proxy.num_round_trips() - before, num_micro_batches(client)))
        (trips, batches), (more_trips, more_batches) = counts
        return (
            f"embedq in steady state: {(more_trips - trips) / (more_batches - batches):.2f} round trips a micro-batch"
            f" ({more_trips - trips} more for {more_batches - batches:.0f} more micro-batches)."
        )

    def idle(self) -> str:
        self._say("idle workers")
        alone = redis_alone_cpu(self._site)
        rows = []
        for contender in CONTENDERS:
            found = idle(self._site, contender, self._producers[contender.system], alone)
            rows.append(
                (
                    contender.name,
                    *(f"{median_ms(found.latencies_s):.2f}", f"{max(found.latencies_s) * 1000:.2f}"),
                    *(f"{found.worker_cpu:.2%}", f"{found.redis_cpu:+.2%}"),
                )
            )
        text = (
            f"## An idle worker\n\nOne job from enqueueing to its result in the client's hands, {NUM_JOBS} of them with"
            " pauses by chance; arq, dramatiq and celery-batches look for work at intervals, here their defaults and"
            f" 0.1 s. CPU over {WATCH_S:g} s as a share of one core; Redis' is what it takes beyond having no worker."
        )
        head = ("", "latency, median ms", "longest ms", "worker CPU", "Redis CPU added")
        return f"{text}\n\n{table(head, rows)}"

    def load(self) -> str:
        self._say("latency under load")
        contenders = {contender.system: contender for contender in CONTENDERS if contender.system in LOADED}
        found = measure.take_turns(
            {name: partial(loaded, self._site, one, self._rate(one)) for name, one in contenders.items()},
            dict.fromkeys(contenders, self._at_most(SIDE_ROUNDS)),
        )
        rows = []
        for name, rounds in found.items():
            cells = [contenders[name].name, f"{median(rounds, lambda one: one.capacity):,.0f}"]
            for share in SHARES:
                for percent in (50, 99):
                    value = median(rounds, lambda one, s=share, p=percent: percentile_ms(one.latencies_s[s], p))
                    cells.append(f"{value:,.1f}")
            rows.append(cells)
        text = (
            "## Latency under load\n\nJobs of one text come by chance (Poisson) for"
            f" {DURATION_S:g} s at a share of the system's own capacity, which is a burst's rate from the first"
            " enqueueing to the last result. From the moment at which a job was to come to its result."
        )
        head = ["", "capacity, jobs/s", *(f"p{p} ms at {share:.0%}" for share in SHARES for p in (50, 99))]
        return f"{text}\n\n{table(head, rows)}"

    def _rate(self, contender: Contender) -> float:
        """Jobs of one text a second that it drains, from that part where it ran."""
        if contender.system in self._drain_rates:
            return self._drain_rates[contender.system]
        return self._site.drain(contender, self._producers[contender.system], contender.num_jobs[1]).jobs_per_s

    def encoder(self) -> str:
        """In a process of its own: torch's threads stay away from the other parts."""
        self._say("the queue before a real encoder")
        command = [sys.executable, "-m", "tests.bench.pipeline_bench", "--rounds", str(self._rounds)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def memory(self) -> str:
        self._say("memory")
        rows = []
        for name, binary in installed_servers().items():
            for configuration, shown in ((None, "the server's defaults"), (CONFIGURATION, "redis.conf that ships")):
                for precision in PRECISIONS:
                    found = job_bytes(binary, configuration, precision)
                    rows.append((name, shown, precision, f"{found.queued:,.0f}", f"{found.finished:,.0f}"))
        text = (
            f"## Redis' memory\n\nUsed memory over {NUM_MEMORY_JOBS:,} jobs of one short text, by default options:"
            " hash, stream, places in registries and what the server needs for its keys. Result: 768 dimensions."
        )
        return (
            f"{text}\n\n{table(('Redis', 'set up by', 'vectors', 'bytes a queued job', 'bytes a finished job'), rows)}"
        )


def _ping_ms(port: int) -> float:
    with connect(f"redis://{HOST}:{port}/0") as client:
        client.ping()
        return statistics.median(measure.seconds(client.ping) for _ in range(PINGS)) * 1000


PARTS: dict[str, Callable[[QueueBench], str]] = {
    "enqueue": QueueBench.enqueue,
    "drain": QueueBench.drain,
    "network": QueueBench.network,
    "idle": QueueBench.idle,
    "load": QueueBench.load,
    "memory": QueueBench.memory,
    "encoder": QueueBench.encoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all of them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be above 0")
    with ExitStack() as stack:
        bench = QueueBench(arguments.rounds, stack)
        parts = [bench.head(), *(PARTS[name](bench) for name in PARTS if name in (arguments.part or PARTS))]
    text = "\n\n".join(parts) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
