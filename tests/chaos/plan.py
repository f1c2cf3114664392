"""What happens in a run and when, as plain data: faults, whom they hit, how long they last, and who enqueues how fast.

Pure: a seed and a duration give one plan. Which process a victim's number means, and what it is doing just then, is up
to the run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal[
    "kill_worker",
    "stop_worker",
    "term_worker",
    "kill_redis",
    "stop_redis",
    "kill_producer",
    "cut",
    "lose_reply",
    "lose_request",
    "tear",
    "delay",
    "stall",
    "script_flush",
    "client_kill",
]
ProducerKind = Literal["sync", "async", "bulk"]

#: Workers of a run.
NUM_WORKERS = 3
#: Of every worker, in seconds. A worker stopped for longer than its lease loses what it holds.
LEASE_S, ENCODE_TIMEOUT_S, GRACE_S = 5.0, 4.0, 10.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Mean seconds between two faults of a kind, and how long each lasts."""

    every_s: float
    lasts_s: tuple[float, float] = (0.0, 0.0)


#: In 30 minutes some 120 workers and 16 servers are killed.
RATES: Mapping[FaultKind, Rate] = {
    "kill_worker": Rate(15),
    "stop_worker": Rate(50, (LEASE_S + 1, LEASE_S + 5)),
    "term_worker": Rate(60),
    "kill_redis": Rate(110, (0.0, 2.0)),
    "stop_redis": Rate(150, (2.0, 8.0)),
    "kill_producer": Rate(90),
    "cut": Rate(25),
    "lose_reply": Rate(3, (4.0, 4.0)),
    "lose_request": Rate(8, (4.0, 4.0)),
    "tear": Rate(10, (4.0, 4.0)),
    "delay": Rate(45, (2.0, 5.0)),
    "stall": Rate(90, (1.0, 6.0)),
    "script_flush": Rate(45),
    "client_kill": Rate(45),
}
#: The scripts around which requests and replies are lost.
SCRIPTS = ("enqueue", "cancel", "claim", "begin", "finish", "renew", "recover", "release", "promote")
#: Nothing happens in the first and the last seconds.
QUIET_S = 2.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`at_s` seconds after the start. `victim`: of the workers or producers, by place; other kinds have none."""

    at_s: float
    kind: FaultKind
    lasts_s: float = 0.0
    victim: int = 0
    #: the script whose request or reply is lost; of it the first so many
    script: str = ""
    times: int = 1


@dataclass(frozen=True, slots=True)
class Producer:
    """One process. `per_s`: jobs; `bulk` puts `group` of them into one call of enqueue_many."""

    name: str
    kind: ProducerKind
    per_s: float
    group: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    seconds: float
    faults: tuple[Fault, ...]
    producers: tuple[Producer, ...]


def plan(seed: int, seconds: float, jobs_per_s: float = 80.0) -> Plan:
    """The faults in order of time, each kind at least once. A kind's gaps lie between half and one and a half of its
    mean, so that a run's numbers are those that its duration promises.
    """
    faults: list[Fault] = []
    producers = _producers(jobs_per_s)
    for kind, rate in RATES.items():
        drawn = random.Random(f"{seed}/{kind}")
        last_s = max(QUIET_S, seconds - QUIET_S - rate.lasts_s[1])
        at_s = drawn.uniform(QUIET_S, max(QUIET_S, min(rate.every_s, last_s)))
        while True:
            faults.append(_draw_fault(drawn, kind, rate, at_s, len(producers)))
            at_s += rate.every_s * drawn.uniform(0.5, 1.5)
            if at_s > last_s:
                break
    return Plan(seed, seconds, tuple(sorted(faults, key=lambda fault: fault.at_s)), producers)


def _producers(jobs_per_s: float) -> tuple[Producer, ...]:
    return (
        Producer("sync0", "sync", 0.2 * jobs_per_s),
        Producer("sync1", "sync", 0.2 * jobs_per_s),
        Producer("async0", "async", 0.25 * jobs_per_s),
        Producer("bulk0", "bulk", 0.35 * jobs_per_s, group=50),
    )


def _draw_fault(drawn: random.Random, kind: FaultKind, rate: Rate, at_s: float, num_producers: int) -> Fault:
    lasts_s = round(drawn.uniform(*rate.lasts_s), 3)
    at_s = round(at_s, 3)
    if kind in ("lose_reply", "lose_request", "tear"):
        return Fault(at_s, kind, lasts_s, script=drawn.choice(SCRIPTS), times=drawn.randint(1, 3))
    victims = num_producers if kind == "kill_producer" else NUM_WORKERS
    return Fault(at_s, kind, lasts_s, victim=drawn.randrange(victims))
