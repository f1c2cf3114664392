"""What the queue's benchmark found, as Markdown tables. Knows no server and no process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from embedq.model.bench_report import table
from tests.bench import measure
from tests.bench.queue_accounts import stage_seconds, starved_share
from tests.bench.queue_drain import Drained

T = TypeVar("T")

#: What ratios are to.
OURS, STOCK = "embedq", "rq-simple"


def median(found: Sequence[T], figure: Callable[[T], float]) -> float:
    return statistics.median(map(figure, found))


def rates_table(title: str, names: Mapping[str, str], rates: Mapping[str, Sequence[float]]) -> str:
    """By system; ratios are of medians, ours over the row's."""
    found = {system: measure.row(names[system], values) for system, values in rates.items()}
    rows = [
        (
            *(row.name, f"{row.median:,.0f}", f"{row.lowest:,.0f} to {row.highest:,.0f}"),
            *(f"{found[OURS].median / row.median:.2f}", f"{row.median / found[STOCK].median:.2f}"),
        )
        for row in found.values()
    ]
    stock = names[STOCK]
    return table((title, "median", "lowest to highest", "embedq times", f"to {stock}"), rows)


def costs_table(texts_per_job: int, names: Mapping[str, str], found: Mapping[str, Sequence[Drained]]) -> str:
    rows = [
        (
            names[system],
            f"{median(drains, lambda one: one.worker_us):,.0f}",
            f"{median(drains, lambda one: one.redis_us):,.0f}",
            f"{median(drains, lambda one: one.commands_per_job):.1f}",
        )
        for system, drains in found.items()
    ]
    return table((f"a job of {_texts(texts_per_job)} costs", "worker CPU, µs", "Redis CPU, µs", "commands"), rows)


def trips_table(names: Mapping[str, str], found: Mapping[str, Sequence[Drained]]) -> str:
    rows = [
        (
            names[system],
            f"{median(drains, lambda one: one.round_trips_per_job):.3f}",
            f"{median(drains, lambda one: one.commands_per_job):.1f}",
        )
        for system, drains in found.items()
        if any(one.num_round_trips for one in drains)
    ]
    return table(("a job of 1 text takes", "round trips", "commands"), rows)


def _texts(number: int) -> str:
    return "1 text" if number == 1 else f"{number} texts"


def stages_text(drains: Sequence[Drained]) -> str:
    logs = [drained.log for drained in drains]
    stages, starved = stage_seconds(logs), starved_share(logs)
    if not stages:
        return "embedq's worker did not tell where its time went."
    num_jobs = sum(drained.num_jobs for drained in drains)
    told = ", ".join(f"{name} {seconds / num_jobs * 1e6:.0f} µs" for name, seconds in stages.items())
    waited = (
        "" if starved is None else f" The stand-in's encoder waited {starved:.1%} of the time in which it had work."
    )
    return f"CPU of embedq's stages by the workers' own account, a job: {told}.{waited}"
