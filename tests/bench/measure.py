"""Interleaved rounds and medians: what every benchmark here is made of. Knows nothing of what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

ROUNDS = 5
#: Columns of a table, whatever the terminal: names are not to be cut.
WIDTH = 110


@dataclass(frozen=True, slots=True)
class Row:
    """One system's rate over all rounds."""

    name: str
    median: float
    lowest: float
    highest: float


def interleaved(candidates: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> list[Row]:
    """Each candidate gives one rate a call; all of them run once a round, so that noise hits all alike."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, measure in candidates.items():
            rates[name].append(measure())
    return [Row(name, statistics.median(found), min(found), max(found)) for name, found in rates.items()]


def seconds(action: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    action()
    return time.perf_counter() - began_at


def show(title: str, unit: str, rows: list[Row], base: str) -> None:
    """A table with each median's ratio to the row named `base`."""
    reference = next(row.median for row in rows if row.name == base)
    table = Table("", f"{unit} (median)", "lowest to highest", f"to {base}", title=title, title_justify="left")
    for row in rows:
        spread = f"{row.lowest:,.0f} to {row.highest:,.0f}"
        table.add_row(row.name, f"{row.median:,.0f}", spread, f"{row.median / reference:.2f}")
    Console(width=WIDTH).print(table)
