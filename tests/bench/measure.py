"""Interleaved rounds and medians: what every benchmark here is made of. Knows nothing of what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One system's rate over all rounds."""

    name: str
    median: float
    lowest: float
    highest: float


def interleaved(candidates: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> list[Row]:
    """Each candidate gives one rate a call; all of them run once a round, so that noise hits all alike."""
    rates = take_turns(candidates, dict.fromkeys(candidates, rounds))
    return [row(name, found) for name, found in rates.items()]


def take_turns(candidates: Mapping[str, Callable[[], T]], rounds: Mapping[str, int]) -> dict[str, list[T]]:
    """What each candidate returned; once a round as long as it has rounds left."""
    found: dict[str, list[T]] = {name: [] for name in candidates}
    for number in range(max(rounds.values(), default=0)):
        for name, candidate in candidates.items():
            if number < rounds[name]:
                found[name].append(candidate())
    return found


def row(name: str, rates: Sequence[float]) -> Row:
    return Row(name, statistics.median(rates), min(rates), max(rates))


def seconds(action: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    action()
    return time.perf_counter() - began_at
