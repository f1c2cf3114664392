"""`embedq worker --processes N` and `--device cuda:all`: which processes there are, on which device, with which cores.

Puts the supervisor together; how it works is in the modules it names.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from embedq.producer.connection import connect
from embedq.producer.errors import ConfigurationError
from embedq.producer.http_endpoints import HttpEndpoints
from embedq.worker.cores import Share, asked_threads, cpu_quota, shares, usable_cores
from embedq.worker.settings import WorkerSettings
from embedq.worker.supervision.children import ChildPlan, ChildProcess, write_to_stderr
from embedq.worker.supervision.cuda_devices import count_cuda_devices, may_have_gpu
from embedq.worker.supervision.invocation import EMBEDQ
from embedq.worker.supervision.pages import FleetPages
from embedq.worker.supervision.slots import Ending, Slot, SlotRules
from embedq.worker.supervision.supervisor import Supervisor

#: As a device: one process, or --processes of them, on each that is visible.
ALL_CUDA = "cuda:all"
MAX_PROCESSES = 1024
RestartOrder = Literal["auto", "start-first", "stop-first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorSettings:
    """Raises ConfigurationError for a value out of range."""

    #: on each device
    processes: int = 1
    #: seconds without an answer after which a process counts as hanging
    hang_timeout_s: float = 30.0
    #: of a rolling restart: whether the new process is ready before the old one ends; auto: not on a GPU, whose memory
    #: may not hold both
    restart_order: RestartOrder = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= MAX_PROCESSES:
            raise ConfigurationError(f"processes must be 1 to {MAX_PROCESSES}, not {self.processes}")
        if not 5 <= self.hang_timeout_s <= 86_400:
            raise ConfigurationError(f"hang_timeout_s must be 5 to 86400 seconds, not {self.hang_timeout_s:g}")
        if self.restart_order not in get_args(RestartOrder):
            raise ConfigurationError(
                f"restart_order must be {', '.join(get_args(RestartOrder))}, not {self.restart_order!r}"
            )


@dataclass(frozen=True, slots=True)
class Place:
    device: str
    share: Share


def places(settings: WorkerSettings, num_processes: int) -> list[Place]:
    """One for each process, in order of its device. Raises ConfigurationError where there is no CUDA device."""
    devices = _devices(settings.device, num_processes)
    divided = shares(usable_cores(), cpu_quota(), len(devices))
    threads = settings.threads or asked_threads()
    found = []
    for device, share in zip(devices, divided, strict=True):
        # A GPU's process computes little, and belongs near its GPU, of which the cores tell nothing.
        cpus = share.cpus if is_on_cpu(settings) else None
        found.append(Place(device, Share(threads or share.threads, cpus)))
    return found


def _devices(device: str, num_processes: int) -> list[str]:
    if device != ALL_CUDA:
        return [device] * num_processes
    return [f"cuda:{index}" for index in range(count_cuda_devices()) for _ in range(num_processes)]


def is_on_cpu(settings: WorkerSettings) -> bool:
    """As far as can be told without torch."""
    if settings.device == "cpu" or settings.model.startswith("noop:"):
        return True
    return settings.device == "auto" and not may_have_gpu()


def make_supervisor(
    plan: ChildPlan,
    supervised: SupervisorSettings,
    *,
    ends_by_itself: bool = False,
    on_tick: Callable[[], None] = lambda: None,
) -> Supervisor:
    """Raises ConfigurationError. Starts nothing."""
    settings = plan.settings
    order = supervised.restart_order
    rules = SlotRules(
        grace_s=settings.grace_s,
        hang_timeout_s=supervised.hang_timeout_s,
        start_first=is_on_cpu(settings) if order == "auto" else order == "start-first",
        ends_by_itself=ends_by_itself,
    )
    slots = [
        Slot(index, place.device, functools.partial(ChildProcess, plan, index, place.device, place.share), rules)
        for index, place in enumerate(places(settings, supervised.processes))
    ]
    return Supervisor(slots, on_tick=on_tick)


@contextlib.contextmanager
def served(supervisor: Supervisor, host: str, port: int | None) -> Iterator[None]:
    """The pages of all processes on one port. Raises ConfigurationError if that cannot be had."""
    if port is None:
        yield
        return
    endpoints = HttpEndpoints(host, port, FleetPages(supervisor).pages)
    endpoints.start()
    try:
        yield
    finally:
        endpoints.close()


def supervise(
    url: str,
    queues: Sequence[str],
    settings: WorkerSettings,
    supervised: SupervisorSettings,
    *,
    name: str | None,
    burst: bool,
    max_jobs: int | None,
    dequeue_strategy: str,
    debug: bool,
) -> Ending:
    """`embedq worker` for several processes. Raises ConfigurationError before any is started."""
    # What is wrong with the URL is to be said once.
    connect(url).close()
    plan = ChildPlan(
        url=url,
        queues=queues,
        settings=settings,
        arguments=[
            *(["--burst"] if burst else []),
            *(["--max-jobs", str(max_jobs)] if max_jobs is not None else []),
            *("--dequeue-strategy", dequeue_strategy),
        ],
        base_name=name or f"{socket.gethostname()}.{os.getpid()}",
        write=write_to_stderr,
        program=(*EMBEDQ, "--debug") if debug else EMBEDQ,
    )
    supervisor = make_supervisor(plan, supervised, ends_by_itself=burst or max_jobs is not None)
    with served(supervisor, settings.metrics_host, settings.metrics_port):
        return supervisor.run()
