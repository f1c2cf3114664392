"""Metrics before and after something is done to a fleet, and whether they moved as they must.

Knows scrapes; what is done, and what must move by it, is the exercises'.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from tests.ops.finding import Finding
from tests.ops.places import Served
from tests.ops.scrape import Metrics

#: Seconds in which what was done must show in the metrics.
SHOWS_WITHIN_S = 30.0
SCRAPE_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Move:
    metric: str
    #: more, less, or the value that it takes
    how: Literal["more", "less"] | float
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_made(self, before: float, after: float) -> bool:
        if self.how == "more":
            return after > before
        if self.how == "less":
            return after < before
        return after == self.how

    def __str__(self) -> str:
        labels = ", ".join(f'{name}="{value}"' for name, value in self.labels.items())
        return f"{self.metric}{{{labels}}}" if labels else self.metric


def more(metric: str, **labels: str) -> Move:
    return Move(metric, "more", labels)


def less(metric: str, **labels: str) -> Move:
    return Move(metric, "less", labels)


def becomes(value: float, metric: str, **labels: str) -> Move:
    return Move(metric, value, labels)


class Watch:
    """Over places whose samples are added up. Attributes: seen (names in any scrape), moved (those that moved)."""

    def __init__(self, finding: Finding) -> None:
        self._finding = finding
        self.seen: set[str] = set()
        self.moved: set[str] = set()

    def scrape(self, places: Sequence[Served]) -> Metrics:
        scraped = sum((place.metrics() for place in places), Metrics([]))
        self.seen |= scraped.names
        return scraped

    @contextmanager
    def expecting(self, cause: str, places: Sequence[Served], *moves: Move) -> Iterator[None]:
        """What is done within the block must make the moves, each at some moment until SHOWS_WITHIN_S after it."""
        before = self.scrape(places)
        yield
        self.await_moves(cause, places, before, moves)

    def await_moves(self, cause: str, places: Sequence[Served], before: Metrics, moves: Sequence[Move]) -> None:
        found: dict[int, float] = {}
        give_up_at = time.monotonic() + SHOWS_WITHIN_S
        while len(found) < len(moves) and time.monotonic() < give_up_at and any(place.is_running for place in places):
            now = self.scrape(places)
            for place, move in enumerate(moves):
                value = now.value(move.metric, **move.labels)
                if place not in found and move.is_made(before.value(move.metric, **move.labels), value):
                    found[place] = value
            time.sleep(SCRAPE_EVERY_S)
        last = self.scrape(places)
        for place, move in enumerate(moves):
            earlier = before.value(move.metric, **move.labels)
            value = found.get(place, last.value(move.metric, **move.labels))
            wanted = f"{move.how}: {cause}" if isinstance(move.how, str) else f"{move.how:g}: {cause}"
            self._finding.check(str(move), f"{earlier:.6g} -> {value:.6g}", wanted, place in found)
            if place in found:
                self.moved.add(move.metric)
