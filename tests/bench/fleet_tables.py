"""What the simulation of fleets found, as Markdown. Knows no server."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedq.model.bench_report import table
from tests.bench.fleet_clients import Streamed
from tests.bench.fleet_idle import Idle, Wake
from tests.bench.fleet_jobs import Kind
from tests.bench.fleet_load import Paced, Waiting, batch_jobs
from tests.bench.fleet_model import CEILING, DRAINED_TEXTS, HOUR_S, JobCost, Plan, memory_bytes, plan
from tests.bench.fleet_rates import CORPORA, RATES, SHORT, TOKENS_PER_BATCH, Corpus, texts_per_s
from tests.bench.fleet_shards import Sharded

CAUTIOUS, MIDDLE, OPTIMISTIC = RATES
FLEETS = (1, 8, 32, 128, 256)
TTLS_S = {"1 minute": 60.0, "10 minutes": 600.0, "1 hour": HOUR_S, "1 day": 24 * HOUR_S}
#: Texts, and devices that one may take for them.
SIZES = ((1e6, (1,)), (1e8, (1, 8)), (1e10, (8, 64, 256)))
MAX_TTL_TEXTS_PER_S = 10_000


@dataclass(slots=True)
class Found:
    """Everything that was measured; what was left out is empty."""

    costs: list[JobCost] = field(default_factory=list)
    #: with the append-only file, synced each second
    durable: list[JobCost] = field(default_factory=list)
    streams: list[Streamed] = field(default_factory=list)
    #: by texts a job: workers that nothing but the server holds back; with H100s at their modelled pace
    saturated: dict[int, list[Paced]] = field(default_factory=dict)
    paced: dict[int, list[Paced]] = field(default_factory=dict)
    waits: list[Waiting] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    wakes: list[Wake] = field(default_factory=list)
    #: by number of servers
    shards: dict[int, list[Sharded]] = field(default_factory=dict)
    #: jobs of the fullest of many servers to the mean, by number of servers
    largest_shares: dict[int, float] = field(default_factory=dict)

    def cost(self, texts: int, precision: str) -> JobCost:
        return next(cost for cost in self.costs if (cost.texts, cost.precision) == (texts, precision))

    def durable_cost(self, texts: int, precision: str) -> JobCost:
        return next(cost for cost in self.durable if (cost.texts, cost.precision) == (texts, precision))


def median_cost(costs: Sequence[JobCost]) -> JobCost:
    """Of the same kind of jobs, field by field."""
    figures = [name for name in JobCost.__dataclass_fields__ if name not in ("texts", "precision")]
    return JobCost(
        costs[0].texts,
        costs[0].precision,
        **{name: statistics.median(getattr(cost, name) for cost in costs) for name in figures},
    )


def rates_text() -> str:
    rows = [
        (
            rate.name,
            f"{rate.tokens_per_s / 1e6:.1f}",
            *(f"{texts_per_s(rate, corpus):,.0f}" for corpus in CORPORA),
            rate.source,
        )
        for rate in RATES
    ]
    head = (
        *("one H100", "million tokens/s"),
        *(f"{corpus.name} of {corpus.tokens} tokens/s" for corpus in CORPORA),
        "taken from",
    )
    return (
        "## What one H100 is taken to encode\n\nNobody has measured embedq on an H100: these are other programs'"
        " published figures for models of the same shape, or of a shape that is counted back to it. They leave out"
        " tokenisation, copies and Python. Where a GPU does less, fewer servers are needed and the texts take longer,"
        f" both in proportion.\n\n{table(head, rows)}"
    )


def costs_text(found: Found) -> str:
    head = (
        *("a job of", "enqueue µs", "claim, publish µs", "read, delete µs", "a text µs", "in KB", "out KB"),
        *("jobs/s", "texts/s", "MB/s"),
    )
    durable_rows = [
        (
            _kind(cost),
            f"{cost.total_us:,.0f}",
            f"{cost.total_us / found.cost(cost.texts, cost.precision).total_us:.2f}",
            *(f"{rate:,.0f}" for rate in (cost.jobs_per_s, cost.texts_per_s, cost.megabytes_per_s)),
        )
        for cost in found.durable
    ]
    durable_head = ("a job of", "all parts µs", "times", "jobs/s", "texts/s", "MB/s")
    return (
        "## What a job takes of one server\n\nTime of the server's main thread by its own account, each part by itself:"
        " enqueued in calls of `embed_stream`'s size, claimed and published by workers that wait for no device, read"
        " and deleted as `embed_stream` does. Redis runs commands on one thread: jobs/s are those whose parts together"
        " fill one, texts/s and MB/s (in and out) what that comes to. Without the append-only file.\n\n"
        f"{table(head, [_cost_row(cost) for cost in found.costs])}\n\nWith it, synced each second as in the"
        f" redis.conf that ships:\n\n{table(durable_head, durable_rows)}"
    )


def clients_text(found: Found) -> str:
    rows = [(_kind(one.kind), f"{one.text_us:.0f}", f"{one.texts_per_s:,.0f}") for one in found.streams]
    head = ("jobs of", "CPU µs a text", "texts/s at most")
    return (
        "## What a client takes\n\nOne thread that runs `embed_stream` and drops the vectors: enqueueing, reading,"
        f" decoding, deleting.\n\n{table(head, rows)}"
    )


def _kind(cost: JobCost | Kind) -> str:
    return f"{cost.texts} text{'s' * (cost.texts > 1)}, {cost.precision}"


def _cost_row(cost: JobCost) -> tuple[str, ...]:
    return (
        _kind(cost),
        *(f"{part:,.0f}" for part in (cost.enqueue_us, cost.work_us, cost.read_us)),
        f"{cost.total_us / cost.texts:.1f}",
        *(f"{size / 1e3:,.1f}" for size in (cost.bytes_in, cost.bytes_out)),
        *(f"{rate:,.0f}" for rate in (cost.jobs_per_s, cost.texts_per_s, cost.megabytes_per_s)),
    )


def saturation_text(found: Found) -> str:
    rows = [
        (
            *(f"{texts}", f"{one.num_workers}", f"{one.jobs_per_s:,.0f}", f"{texts * one.jobs_per_s:,.0f}"),
            *(f"{one.cpu_share:.0%}", f"{one.cpu_us:,.0f}", f"{1e6 / one.cpu_us:,.0f}"),
            f"{1e6 / found.cost(texts, 'float32').work_us:,.0f}",
        )
        for texts, rows_ in found.saturated.items()
        for one in rows_
    ]
    head = (
        *("texts a job", "workers", "jobs/s", "texts/s", "server's thread busy", "µs a job"),
        *("jobs/s at 100%", "jobs/s by the table above"),
    )
    return (
        "## Opened up\n\nWorkers that claim and publish as fast as the server answers, float32. They share the"
        " machine's other core, so that many of them hold one another up before they hold up the server; the last"
        " columns are what the server would do were it busy all the time, by what a job cost it here and in the table"
        f" above (claim and publication alone).\n\n{table(head, rows)}"
    )


def paced_text(found: Found) -> str:
    rows = []
    for texts, all_ in found.paced.items():
        work_us = found.cost(texts, "float32").work_us
        for one in all_:
            wanted = one.num_workers * batch_jobs(Kind(texts)) / one.cycle_s
            rows.append(
                (
                    *(f"{texts}", f"{one.num_workers}", f"{wanted:,.0f}", f"{one.jobs_per_s:,.0f}"),
                    f"{min(wanted, 1e6 / work_us):,.0f}",
                    *(f"{one.late_share:.0%}", f"{one.cpu_share:.0%}"),
                )
            )
    head = (
        *("texts a job", "H100s", "they could, jobs/s", "they did", "by the model"),
        *("micro-batches that waited", "server's thread busy"),
    )
    return (
        f"## H100s at their modelled pace\n\nMicro-batches of {TOKENS_PER_BATCH:,} tokens,"
        f" {TOKENS_PER_BATCH // SHORT.tokens} sentences, each {TOKENS_PER_BATCH / MIDDLE.tokens_per_s * 1e3:.1f} ms"
        f" of a device ({MIDDLE.name} rate), float32. A worker claims and publishes once in that time, one call after"
        " the other (a real one has three threads for it); producers and readers of results are not there. The model:"
        f" what the devices could do, or what fills the server.\n\n{table(head, rows)}"
    )


def waits_text(found: Found) -> str:
    rows = [
        (
            *(f"{one.measured.num_workers}", f"{one.measured.jobs_per_s:,.0f}", f"{one.measured.cpu_share:.0%}"),
            *(f"{one.measured_s * 1e3:.2f}", f"{one.predicted_s * 1e3:.2f}", f"{one.measured.slow_call_s * 1e3:.1f}"),
        )
        for one in found.waits
    ]
    head = ("workers", "jobs/s", "server's thread busy", "mean call ms", "by the model ms", "1% take longer than ms")
    return (
        "## How long calls take under load\n\nJobs of 8 texts, float16. The devices are slowed down until all of them"
        " together ask for a share of this server, which is what matters to it. The model: a call's time at an idle"
        " server, and the wait for those before it by Pollaczek and Khinchine, at the share that the server's thread"
        " was busy. It is a lower bound here, where the workers share a core and other work takes its part of both."
        " Where calls take a second the server got less of the machine than was asked of it: so a full one looks. A"
        " worker claims four micro-batches ahead, so that waits of milliseconds cost no throughput."
        f"\n\n{table(head, rows)}"
    )


def idle_text(found: Found) -> str:
    rows = [
        (
            *(f"{one.num_workers}", "processes" if one.are_real else "simulated", f"{one.connections}"),
            *(f"{one.commands_per_s:,.0f}", f"{one.meter.cpu_share:.2%}", f"{one.memory_bytes / 1e6:.1f}"),
        )
        for one in found.idle
    ]
    head = ("workers", "", "connections", "commands/s", "server's thread busy", "memory MB")
    woken: dict[int, list[Wake]] = {}
    for one in found.wakes:
        woken.setdefault(one.num_workers, []).append(one)
    wake_rows = [
        (
            f"{number}",
            f"{statistics.median(one.num_woken for one in some):.0f}",
            f"{statistics.median(one.cpu_s for one in some) * 1e3:.1f}",
            f"{statistics.median(one.claimed_after_s for one in some) * 1e3:.1f}",
        )
        for number, some in woken.items()
    ]
    wake_head = ("workers that wait", "woken by one job", "server's CPU ms", "claimed after ms")
    return (
        "## A fleet with nothing to do\n\nWaits for jobs, leases, looks for abandoned jobs, scheduled jobs each"
        " second, commands. Simulated workers are made of the real one's parts, as threads of one process; a few real"
        f" ones stand beside them.\n\n{table(head, rows)}\n\nOne job of one text comes to the waiting fleet. (All"
        " workers share one core here, so that the claim is late by the time that they take from one another.)"
        f"\n\n{table(wake_head, wake_rows)}"
    )


def shards_text(found: Found) -> str:
    rows = [
        (
            f"{servers}",
            " + ".join(f"{number:,}" for number in some[0].jobs),
            f"{some[0].largest_share:.3f}",
            " + ".join(f"{seconds:.2f}" for seconds in some[0].cpu_s),
            f"{statistics.median(one.cpu_us for one in some):,.0f}",
        )
        for servers, some in found.shards.items()
    ]
    head = ("servers", "jobs", "fullest to the mean", "CPU s of each", "µs a job")
    spread = ", ".join(f"{share:.3f} of {servers}" for servers, share in found.largest_shares.items())
    return (
        "## Several servers\n\nThe same jobs of 64 texts, float32, by rendezvous hashing of their ids; each worker"
        " serves one server. Two cores cannot show several servers at full speed, so that this is their accounts:"
        f" what each of them computed.\n\n{table(head, rows)}\n\nBy the hash alone, 100,000 ids: the fullest server"
        f" has {spread} times the mean."
    )


def devices_text(found: Found) -> str:
    head = (
        f"H100s that one server feeds, {CEILING:.0%} busy",
        *(f"{corpus.name}, {rate.name}" for corpus in CORPORA for rate in (CAUTIOUS, OPTIMISTIC)),
    )
    rows = [
        (
            _kind(cost),
            *(
                f"{cost.devices(texts_per_s(rate, corpus), CEILING):,.1f}"
                for corpus in CORPORA
                for rate in (CAUTIOUS, OPTIMISTIC)
            ),
        )
        for cost in found.durable
    ]
    return (
        "## How many H100s a server feeds\n\nWith producers and readers of results, and with the append-only file."
        f"\n\n{table(head, rows)}"
    )


def fleets_text(found: Found) -> str:
    parts = []
    for corpus in CORPORA:
        rows = []
        for cost in found.durable:
            plans = [plan(1e9, texts_per_s(MIDDLE, corpus), number, cost) for number in FLEETS]
            rows.append((_kind(cost), *(f"{one.num_servers} ({one.megabytes_per_s * 8 / 1e3:,.1f})" for one in plans)))
        head = (f"{corpus.name}: servers (Gbit/s)", *(f"{number} H100{'s' * (number > 1)}" for number in FLEETS))
        parts.append(table(head, rows))
    return (
        f"## Servers for a fleet\n\n{MIDDLE.name.capitalize()} rate, servers {CEILING:.0%} busy at most, with the"
        " append-only file; in brackets what goes in and out of all of them together.\n\n" + "\n\n".join(parts)
    )


def memory_text(found: Found) -> str:
    rows = [
        (
            _kind(cost),
            f"{cost.queued_bytes / cost.texts:,.0f}",
            f"{cost.finished_bytes / cost.texts:,.0f}",
            *(_bytes(memory_bytes(cost, MAX_TTL_TEXTS_PER_S, ttl_s)) for ttl_s in TTLS_S.values()),
        )
        for cost in found.costs
    ]
    head = (
        *("a job of", "bytes a waiting text", "bytes a finished text"),
        *(f"kept for {name}" for name in TTLS_S),
    )
    return (
        "## Memory by time to live\n\nResults that nobody deletes, at 10,000 texts/s; in proportion to the rate."
        " Results that `embed_stream` reads are deleted at once: then it is only what is under way. A block of memory"
        " has one of a few sizes: 64 vectors and what belongs to them are just above one, 60 are below it."
        f"\n\n{table(head, rows)}"
    )


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}"
    return f"{number / 1e3:,.0f} KB"


def sizing_text(found: Found) -> str:
    cost = found.durable_cost(64, "float16")
    rows = []
    for corpus in CORPORA:
        for num_texts, fleets in SIZES:
            for number in fleets:
                slow, fast = (
                    plan(num_texts, texts_per_s(rate, corpus), number, cost) for rate in (CAUTIOUS, OPTIMISTIC)
                )
                rows.append(_sizing_row(corpus, number, slow, fast))
    head = (
        *("texts", "H100s", "time", "servers", "network Gbit/s", "Redis memory, drained"),
        *("results left for an hour", "all vectors"),
    )
    return (
        "## How much for how many texts\n\nJobs of 64 texts, float16 results, drained by `embed_stream` as they come;"
        f" 100,000 texts under way. From the {CAUTIOUS.name} rate to the {OPTIMISTIC.name} one, servers"
        f" {CEILING:.0%} busy at most, with the append-only file.\n\n{table(head, rows)}"
    )


def arithmetic_text(found: Found) -> str:
    cost, number, num_texts = found.durable_cost(64, "float16"), 8, 1e8
    one = plan(num_texts, texts_per_s(MIDDLE, SHORT), number, cost)
    jobs_per_s = one.texts_per_s / cost.texts
    steps = (
        f"Texts a second: {number} H100s x {MIDDLE.tokens_per_s:,.0f} tokens/s / {SHORT.tokens} tokens ="
        f" {one.texts_per_s:,.0f}; jobs of {cost.texts}: {jobs_per_s:,.0f} a second.",
        f"Time: {num_texts:,.0f} / {one.texts_per_s:,.0f} = {one.seconds:,.0f} s.",
        f"Servers: {jobs_per_s:,.0f} jobs/s x {cost.total_us:,.0f} µs = {jobs_per_s * cost.total_us / 1e6:.2f} busy"
        f" threads; at {CEILING:.0%} each that is {jobs_per_s * cost.total_us / 1e6 / CEILING:.1f}, so"
        f" {one.num_servers}.",
        f"Network: {jobs_per_s:,.0f} jobs/s x ({cost.bytes_in / 1e3:,.0f} + {cost.bytes_out / 1e3:,.0f} KB) ="
        f" {one.megabytes_per_s:,.0f} MB/s in and out of all servers; the append-only files take what comes"
        " in and 2 KB a job.",
        f"Memory, drained: {DRAINED_TEXTS:,} texts under way x {cost.finished_bytes / cost.texts:,.0f} bytes ="
        f" {_bytes(one.drained_bytes)}. Left for an hour: {one.texts_per_s:,.0f} texts/s x {one.seconds:,.0f} s (the"
        f" run is shorter than the hour) x {cost.finished_bytes / cost.texts:,.0f} bytes = {_bytes(one.left_bytes)}.",
    )
    limits = (
        "No GPU ran, and the queue and the workers were on one machine of two cores, with other work beside them. A"
        " server's own core on faster hardware does more; costs are per job, so that they scale with it.",
        "A real worker also tokenizes, plans and serializes; see queue.md for what that takes of its CPU. Whether one"
        " process keeps an H100 busy with short texts has not been measured.",
        "Several servers were measured two and four at a time at low load; more are reckoned.",
        "Rewrites of an append-only file of hundreds of GB, replicas, TLS and networks slower than their nominal rate"
        " are not in these figures.",
    )
    return (
        "### The arithmetic\n\n100 million sentences by 8 H100s at the middle rate, 64 texts a job, float16:\n\n"
        + "\n".join(f"- {step}" for step in steps)
        + "\n\n### What these figures do not show\n\n"
        + "\n".join(f"- {limit}" for limit in limits)
    )


def _sizing_row(corpus: Corpus, number: int, slow: Plan, fast: Plan) -> tuple[str, ...]:
    return (
        f"{_count(slow.num_texts)} {corpus.name}",
        f"{number}",
        f"{_time(fast.seconds)} to {_time(slow.seconds)}",
        _range(slow.num_servers, fast.num_servers, "d"),
        _range(slow.megabytes_per_s * 8 / 1e3, fast.megabytes_per_s * 8 / 1e3, ".1f"),
        _bytes(fast.drained_bytes),
        f"{_bytes(slow.left_bytes)} to {_bytes(fast.left_bytes)}"
        if slow.left_bytes != fast.left_bytes
        else _bytes(slow.left_bytes),
        _bytes(slow.num_texts * 768 * 2),
    )


def _range(low: float, high: float, form: str) -> str:
    first, last = format(low, form), format(high, form)
    return first if first == last else f"{first} to {last}"


def _count(number: float) -> str:
    for name, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:,.0f} {name}"
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    for unit, size in (("d", 24 * HOUR_S), ("h", HOUR_S), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"
