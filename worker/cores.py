"""The processor cores of this process and how several children share them: affinity, control groups, siblings.

Knows the operating system's files and arithmetic; knows no model. Of a system that tells nothing each CPU is a core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: What the libraries under a worker read before they make their threads: OpenMP and torch, MKL, numpy's BLAS, and the
#: tokenizers' Rust.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core. Cores in order of their place lie together: first by package."""

    place: tuple[int, int]
    #: its CPU numbers: two where it runs two threads
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several processes gets of the machine."""

    threads: int
    #: the CPU numbers that it keeps to; None: the system places it
    cpus: frozenset[int] | None


def shares(cores: Sequence[Core], quota: float | None, num_processes: int) -> list[Share]:
    """Each core to one process, neighbours together, so that all threads together are no more than the cores.

    Where a quota (in CPUs) allows less than the cores, only the threads are divided: which cores a container runs on is
    the system's choice, and others may be after the same ones. Where processes outnumber cores they share them.
    """
    ordered = sorted(cores, key=lambda core: core.place)
    allowed = len(ordered) if quota is None else min(len(ordered), math.ceil(quota))
    sizes = [max(1, size) for size in _divided(allowed, num_processes)]
    if allowed < len(ordered) or num_processes > len(ordered):
        return [Share(size, None) for size in sizes]
    found, taken = [], 0
    for size in sizes:
        cpus = frozenset(cpu for core in ordered[taken : taken + size] for cpu in core.cpus)
        found.append(Share(size, cpus))
        taken += size
    return found


def _divided(total: int, num_parts: int) -> list[int]:
    """Whole numbers that differ by one at most, the larger first."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]


def usable_cores() -> list[Core]:
    """Those that this process may run on, with their CPU numbers that it may use."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(cpus):
        found.setdefault(_place(cpu), []).append(cpu)
    return [Core(place, tuple(numbers)) for place, numbers in found.items()]


def _place(cpu: int) -> tuple[int, int]:
    """The package, and the first CPU number of the core, which the system numbers anew in each package."""
    folder = _CPUS / f"cpu{cpu}" / "topology"
    try:
        package = int((folder / "physical_package_id").read_text())
        siblings = (folder / "thread_siblings_list").read_text()
        return package, int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return 0, cpu


def cpu_quota() -> float | None:
    """CPUs' worth of time that the control groups allow this process; None: no limit."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return None
    quotas = [quota for line in lines if (quota := _quota_of(line)) is not None]
    return min(quotas, default=None)


def _quota_of(line: str) -> float | None:
    """Of a line `0::/path` (version 2) or `1:cpu,cpuacct:/path`: the least on the way up to the root."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return None
    root = _CGROUPS if not controllers else _CGROUPS / "cpu"
    folder = root / path.lstrip("/")
    quotas = []
    while True:
        quota = _quota_in(folder)
        if quota is not None:
            quotas.append(quota)
        if folder == root or root not in folder.parents:
            return min(quotas, default=None)
        folder = folder.parent


def _quota_in(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        # `max` and -1 say that there is none.
        return int(quota) / int(period) if quota.strip() not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def asked_threads(environment: Mapping[str, str] | None = None) -> int | None:
    """What OMP_NUM_THREADS asks for, by which everybody sets threads."""
    text = (os.environ if environment is None else environment).get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def default_threads(most: int) -> int:
    """For a process of its own that was told no number: what the variable asks for, else `most` within the quota."""
    quota = cpu_quota()
    return asked_threads() or (most if quota is None else min(most, math.ceil(quota)))


def thread_variables(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREAD_VARIABLES, str(threads))
