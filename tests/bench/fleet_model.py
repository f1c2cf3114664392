"""What a fleet asks of Redis, from what one job costs it. Arithmetic alone: no server, no clock.

Redis runs commands on one thread, so that a server is full when its main thread's seconds a second come to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Of its main thread, what a server is to be given at most: waiting times grow as 1 / (1 - utilisation).
CEILING = 0.6
HOUR_S = 3600.0
#: Texts that are under way at a time, queued or finished and not read, where results are drained.
DRAINED_TEXTS = 100_000


@dataclass(frozen=True, slots=True)
class JobCost:
    """What one job takes of a server, from enqueueing until its result was read and deleted."""

    texts: int
    precision: str
    #: microseconds of the server's main thread: enqueueing; claim and publication; reading the result and deleting it
    enqueue_us: float
    work_us: float
    read_us: float
    #: bytes that the server receives and sends
    bytes_in: float
    bytes_out: float
    #: bytes of memory while the job waits, and once it is finished
    queued_bytes: float
    finished_bytes: float

    @property
    def total_us(self) -> float:
        return self.enqueue_us + self.work_us + self.read_us

    @property
    def jobs_per_s(self) -> float:
        """That fill one server."""
        return 1e6 / self.total_us

    @property
    def texts_per_s(self) -> float:
        return self.texts * self.jobs_per_s

    @property
    def megabytes_per_s(self) -> float:
        """In both directions, at that rate."""
        return (self.bytes_in + self.bytes_out) * self.jobs_per_s / 1e6

    def devices(self, texts_per_s: float, ceiling: float = 1.0) -> float:
        """That one server feeds at a share of what it can do, each of which encodes so many texts a second."""
        return ceiling * self.texts_per_s / texts_per_s

    def utilisation(self, texts_per_s: float) -> float:
        """Share of a server's main thread that so many texts a second take."""
        return texts_per_s / self.texts_per_s


def memory_bytes(cost: JobCost, texts_per_s: float, result_ttl_s: float) -> float:
    """Of the results that are there at a time if each stays for its whole time to live."""
    return texts_per_s / cost.texts * result_ttl_s * cost.finished_bytes


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of call to a server that does one at a time."""

    per_s: float
    service_s: float


def utilisation(calls: Sequence[Call]) -> float:
    return sum(call.per_s * call.service_s for call in calls)


def wait_s(calls: Sequence[Call]) -> float:
    """Mean seconds that a call waits for those before it (Pollaczek and Khinchine; calls come by chance).

    Infinite where the server cannot keep up.
    """
    busy = utilisation(calls)
    if busy >= 1:
        return math.inf
    return sum(call.per_s * call.service_s**2 for call in calls) / (2 * (1 - busy))


@dataclass(frozen=True, slots=True)
class Plan:
    """A corpus through a fleet."""

    num_texts: float
    num_devices: int
    seconds: float
    texts_per_s: float
    jobs: float
    num_servers: int
    #: share of each server's main thread
    utilisation: float
    #: in and out of all servers together
    megabytes_per_s: float
    #: bytes of results in all: if they are left, those of the time to live or of the whole run, whichever ends first
    left_bytes: float
    #: if they are drained as they come
    drained_bytes: float


def plan(
    num_texts: float,
    device_texts_per_s: float,
    num_devices: int,
    cost: JobCost,
    *,
    result_ttl_s: float = HOUR_S,
    window_texts: int = DRAINED_TEXTS,
    ceiling: float = CEILING,
) -> Plan:
    """ceiling: share of each server's main thread that may be busy."""
    rate = device_texts_per_s * num_devices
    seconds = num_texts / rate
    num_servers = max(1, math.ceil(cost.utilisation(rate) / ceiling))
    return Plan(
        num_texts=num_texts,
        num_devices=num_devices,
        seconds=seconds,
        texts_per_s=rate,
        jobs=num_texts / cost.texts,
        num_servers=num_servers,
        utilisation=cost.utilisation(rate) / num_servers,
        megabytes_per_s=rate / cost.texts * (cost.bytes_in + cost.bytes_out) / 1e6,
        left_bytes=memory_bytes(cost, rate, min(result_ttl_s, seconds)),
        drained_bytes=min(window_texts, num_texts) / cost.texts * max(cost.queued_bytes, cost.finished_bytes),
    )
