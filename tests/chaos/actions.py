"""What one producer does, step by step, from the plan alone: each job once, and the second thoughts about some.

Pure: an endless sequence in order of time, the same for the same seed and producer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.draws import Job, draw_job
from tests.chaos.plan import Producer

ActionKind = Literal["enqueue", "double", "rival", "cancel"]


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """`at_s` seconds after the start; only `enqueue` is of more than one job."""

    at_s: float
    key: str
    kind: ActionKind = field(compare=False)
    jobs: tuple[Job, ...] = field(compare=False)


def actions(seed: int, producer: Producer) -> Iterator[Action]:
    later: list[Action] = []
    number = 0
    while True:
        at_s = number / producer.per_s
        while later and later[0].at_s <= at_s:
            yield heapq.heappop(later)
        numbers = range(number, number + producer.group)
        jobs = tuple(draw_job(seed, producer.name, each, one_text=producer.group > 1) for each in numbers)
        yield Action(at_s, f"enqueue {jobs[0].id}", "enqueue", jobs)
        for job in jobs:
            for thought in _second_thoughts(at_s, job):
                heapq.heappush(later, thought)
        number += producer.group


def _second_thoughts(at_s: float, job: Job) -> Iterator[Action]:
    moments: tuple[tuple[ActionKind, float | None], ...] = (
        ("double", job.doubled_after_s),
        ("rival", job.rivaled_after_s),
        ("cancel", job.canceled_after_s),
    )
    for kind, after_s in moments:
        if after_s is not None:
            yield Action(at_s + after_s, f"{kind} {job.id}", kind, (job,))
