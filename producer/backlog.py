"""How long a fleet will take for what waits: tokens waiting over the tokens/s of those who serve the queue. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embedq.producer.figures import WorkerFigures
from embedq.producer.waiting import Waiting

#: Tokens of a byte of a job's data, where no worker has learnt it yet: as workers themselves begin.
TOKENS_PER_BYTE = 0.25
#: Tokens of a job, where neither its data may be looked at nor any worker has done one yet.
TOKENS_PER_JOB = 64.0


@dataclass(frozen=True, slots=True)
class Load:
    """One queue's work: what waits, and who is there for it."""

    texts: int
    tokens: int
    #: of all workers that serve the queue, while they encode; 0 where none is known
    tokens_per_s: float
    #: tokens over tokens_per_s; inf where jobs wait and no rate is known
    backlog_s: float


class Backlog:
    """Loads of queues, look after look: remembers what workers told, so that a queue whose workers are gone has a
    backlog still."""

    def __init__(self) -> None:
        #: by queue, the last rate that was known, and what its workers told last
        self._rates: dict[str, float] = {}
        self._told: dict[str, Sequence[WorkerFigures]] = {}
        self._told_by_any: Sequence[WorkerFigures] = ()

    def learn(self, figures: Sequence[WorkerFigures]) -> None:
        """What the workers of all queues tell by now, for queues whose own never told anything."""
        self._told_by_any = figures or self._told_by_any

    def load(self, queue: str, jobs: int, waiting: Waiting | None, serving: Sequence[WorkerFigures | None]) -> Load:
        """jobs: that wait. waiting: None where jobs may not be looked at; then they count as those done before did.

        serving: of the live workers that serve the queue, None of one without figures.
        """
        if told := [figures for figures in serving if figures is not None]:
            self._told[queue] = told
        told_last = self._told.get(queue, self._told_by_any)
        if waiting is not None:
            jobs, texts = waiting.jobs, waiting.texts
            tokens = round(waiting.bytes * tokens_per_byte(told_last))
        else:
            texts_per_job, tokens_per_job = size_of_jobs(told_last)
            texts, tokens = round(jobs * texts_per_job), round(jobs * tokens_per_job)
        if rate := tokens_per_s(serving):
            self._rates[queue] = rate
        return Load(texts, tokens, rate, backlog_s(jobs, tokens, rate or self._rates.get(queue, 0.0)))


def tokens_per_byte(figures: Sequence[WorkerFigures]) -> float:
    """The mean of what workers have learnt."""
    ratios = [each.tokens_per_byte for each in figures if each.tokens_per_byte]
    return sum(ratios) / len(ratios) if ratios else TOKENS_PER_BYTE


def size_of_jobs(figures: Sequence[WorkerFigures]) -> tuple[float, float]:
    """Texts and tokens of one job, on average over those that these workers have done."""
    if not (jobs := sum(each.jobs for each in figures)):
        return 1.0, TOKENS_PER_JOB
    return sum(each.texts for each in figures) / jobs, sum(each.tokens for each in figures) / jobs


def tokens_per_s(serving: Sequence[WorkerFigures | None]) -> float:
    """Of all these workers; one that has not encoded yet counts as the others do on average. 0 where none has."""
    rates = [figures.tokens_per_s for figures in serving if figures is not None and figures.tokens_per_s]
    return len(serving) * sum(rates) / len(rates) if rates else 0.0


def backlog_s(jobs: int, tokens: int, rate: float) -> float:
    """Seconds until `tokens` are encoded."""
    if not jobs:
        return 0.0
    return tokens / rate if rate else math.inf
