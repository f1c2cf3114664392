"""The jobs of a run: which texts, which options, who cancels or doubles them, and which are poison.

Pure: the same seed, producer and number give the same job, so that a job's identity is its number and whoever checks it
afterwards needs no more than its id. Knows no Redis and no clock.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

Poison = Literal[
    "raise", "nan", "oom", "crowd", "abort", "exit", "hang", "lost-device", "tokenize-raise", "tokenize-abort"
]

#: What a poison text begins with; its kind follows, and a colon.
POISON_MARK = "poison:"
#: Of a thousand jobs, how many carry each kind of poison. Those that end the process are rare: each costs every job
#: that its worker has in hand an attempt, and three or four workers their lives.
POISON_PER_MILLE: Mapping[Poison, float] = {
    "raise": 3.0,
    "nan": 3.0,
    "oom": 1.0,
    "crowd": 1.5,
    "tokenize-raise": 2.0,
    "abort": 0.12,
    "exit": 0.08,
    "tokenize-abort": 0.08,
    "lost-device": 0.06,
    "hang": 0.06,
}
#: Poison that harms only a micro-batch of many texts, so that its job must finish.
HARMLESS_ALONE: frozenset[Poison] = frozenset({"crowd"})
#: Poison that ends the worker's process, or its use.
DEADLY: frozenset[Poison] = frozenset({"abort", "exit", "tokenize-abort", "lost-device", "hang"})
#: What a job whose settings are shared may carry: what needs no retries of its own.
WITHOUT_RETRIES: frozenset[Poison] = frozenset({"crowd", "nan"})
#: Of this producer each of the first jobs in this step carries one kind after the other, so that no run is without.
PLANTED_AT, PLANTED_STEP = "sync0", 20
#: Retries of a job that nothing may fail but itself: more than workers can die on it.
ENOUGH_RETRIES = 40
#: Retries that workers' deaths may use up, as the client's default is.
FEW_RETRIES = 3
#: Seconds for which results and failures are kept, and of those that are to vanish early.
LONG_TTL_S, SHORT_TTL_S = 240, 60
#: Seconds for which a client that enqueues an ended job again keeps its result at least.
LINGER_S = 60
#: A job waits for one of so many before it.
PARENTS = 5
#: Seconds until a job is enqueued for the second time on purpose, or canceled, at most.
SECOND_THOUGHTS_S = 3.0

_WORDS = "der schnelle braune fuchs springt über den hund queue vector 東京 résumé naïve тест 🙂 of and the".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it is meant; times are seconds after it was enqueued first."""

    id: str
    texts: tuple[str, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    poison: Poison | None = None
    #: the place of the poison text
    poison_index: int | None = None
    #: how long it is put off
    delay_s: float = 0.0
    #: the job that it waits for
    depends_on: str | None = None
    #: when it is enqueued for the second time
    doubled_after_s: float | None = None
    #: when another request tries to take its id
    rivaled_after_s: float | None = None
    canceled_after_s: float | None = None

    @property
    def is_innocent(self) -> bool:
        """Whether nothing in it can fail it."""
        return self.poison is None or self.poison in HARMLESS_ALONE

    @property
    def retries(self) -> int:
        return int(self.keywords["retries"])

    @property
    def result_ttl(self) -> int:
        return int(self.keywords["result_ttl"])

    @property
    def failure_ttl(self) -> int:
        return int(self.keywords["failure_ttl"])


def job_id(producer: str, number: int) -> str:
    return f"{producer}-{number}"


def parse_id(job: str) -> tuple[str, int]:
    """Raises ValueError for what is no id of a run."""
    producer, _, number = job.rpartition("-")
    return producer, int(number)


def draw_job(seed: int, producer: str, number: int, *, one_text: bool = False) -> Job:
    """`one_text`: as `enqueue_many` takes them, with the settings that all jobs of one call share."""
    job = _draw_alone(seed, producer, number, one_text=one_text)
    if one_text or not job.is_innocent or job.delay_s:
        return job
    drawn = random.Random(f"{seed}/{producer}/{number}/relations")
    parent = _draw_alone(seed, producer, max(0, number - drawn.randint(1, PARENTS)))
    return replace(job, depends_on=parent.id) if drawn.random() < 0.03 and _may_be_waited_for(job, parent) else job


def _may_be_waited_for(job: Job, parent: Job) -> bool:
    """It is sure to finish, and to be there as long as somebody may try to enqueue the job."""
    is_sure = parent.is_innocent and parent.retries == ENOUGH_RETRIES and parent.canceled_after_s is None
    return is_sure and parent.result_ttl == LONG_TTL_S and parent.id != job.id


@lru_cache(maxsize=4096)
def _draw_alone(seed: int, producer: str, number: int, *, one_text: bool = False) -> Job:
    drawn = random.Random(f"{seed}/{producer}/{number}")
    poison = _planted(producer, number) or _draw_poison(drawn)
    if one_text and poison not in WITHOUT_RETRIES:
        poison = None
    num_texts = 1 if one_text else _draw_size(drawn)
    name = job_id(producer, number)
    texts = [_draw_text(drawn, f"{seed}/{name}/{place}") for place in range(num_texts)]
    index = None
    if poison is not None:
        index = drawn.randrange(num_texts)
        texts[index] = f"{POISON_MARK}{poison}:{texts[index]}"
    keywords = shared_keywords() if one_text else _draw_keywords(drawn, poison)
    late = _draw_second_thoughts(drawn, may=poison is None or poison not in DEADLY)
    delay_s = 0.0 if one_text or drawn.random() > 0.04 else round(drawn.uniform(0.5, 4.0), 1)
    return Job(name, tuple(texts), keywords, poison, index, delay_s, **late)


def shared_keywords() -> dict[str, Any]:
    return {"retries": ENOUGH_RETRIES, "result_ttl": LONG_TTL_S, "failure_ttl": LONG_TTL_S}


def _planted(producer: str, number: int) -> Poison | None:
    kinds = tuple(POISON_PER_MILLE)
    step, rest = divmod(number, PLANTED_STEP)
    return kinds[step] if producer == PLANTED_AT and rest == PLANTED_STEP // 2 and step < len(kinds) else None


def _draw_poison(drawn: random.Random) -> Poison | None:
    place = drawn.uniform(0, 1000)
    for kind, share in POISON_PER_MILLE.items():
        place -= share
        if place < 0:
            return kind
    return None


def _draw_size(drawn: random.Random) -> int:
    """1 to 64 texts, mostly few."""
    lowest, highest = drawn.choices([(1, 1), (2, 4), (5, 16), (17, 64)], [50, 33, 13, 4])[0]
    return drawn.randint(lowest, highest)


def _draw_text(drawn: random.Random, mark: str) -> str:
    """Begins with its mark, so that no two texts of a run are the same."""
    return " ".join([mark, *drawn.choices(_WORDS, k=drawn.randint(0, 30))])


def _draw_keywords(drawn: random.Random, poison: Poison | None) -> dict[str, Any]:
    ttl = drawn.choices([LONG_TTL_S, SHORT_TTL_S], [3, 1])[0]
    keywords: dict[str, Any] = {"result_ttl": ttl, "failure_ttl": ttl}
    if poison is not None and poison not in HARMLESS_ALONE:
        keywords["retries"] = drawn.randint(0, 2)
        return keywords
    keywords["retries"] = drawn.choices([ENOUGH_RETRIES, FEW_RETRIES], [9, 1])[0]
    keywords |= drawn.choices(
        [{}, {"precision": "float16"}, {"dimensions": 48}, {"prompt": "query: "}, {"precision": "int8"}],
        [70, 10, 10, 5, 5],
    )[0]
    if drawn.random() < 0.02:
        keywords["at_front"] = True
    if drawn.random() < 0.04:
        keywords["retry_intervals"] = (1,)
    return keywords


def _draw_second_thoughts(drawn: random.Random, *, may: bool) -> dict[str, float]:
    """Nobody doubles or cancels what ends processes: how often it did is part of the check."""
    thought = drawn.choices(["canceled_after_s", "doubled_after_s", "rivaled_after_s", None], [3, 5, 1, 91])[0]
    after_s = drawn.choice([0.0, drawn.uniform(0, 0.3), drawn.uniform(0, SECOND_THOUGHTS_S)])
    return {thought: after_s} if thought is not None and may else {}
