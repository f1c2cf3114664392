"""What a measurement ran on, for the head of its table: processor or GPU, versions, memory in use.

Knows no encoder. What a system does not tell is None or left out, never guessed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from embedq.model.cpu import cpu_flags, cpu_name

#: Instruction sets that decide which kernels run: x86 by Linux' names, then ARM's.
CPU_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve"),
)
#: Packages whose version a table names, where they are installed.
PACKAGES = ("embedq", "torch", "tokenizers", "numpy")
GIBIBYTE = 1 << 30
#: What makes Linux forget the highest memory use so far, written to /proc/self/clear_refs.
RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Machine:
    #: name of the CPU or GPU that computes
    device: str
    #: cores and instruction sets, or the GPU's memory, capability and driver
    details: str
    system: str
    versions: dict[str, str]

    def lines(self) -> list[str]:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return [f"{self.device} ({self.details})", f"{self.system}; {versions}"]


def describe_machine(device: torch.device) -> Machine:
    name, details = _gpu(device) if device.type == "cuda" else _cpu()
    return Machine(name, details, f"{platform.system()} {platform.machine()}", _versions())


def _cpu() -> tuple[str, str]:
    name = cpu_name() or platform.processor() or platform.machine()
    details = [f"{num_cores()} cores", f"{torch.get_num_threads()} threads"]
    return name, ", ".join([*details, *(flag for flag in CPU_FLAGS if flag in cpu_flags())])


def num_cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu(device: torch.device) -> tuple[str, str]:
    properties = torch.cuda.get_device_properties(device)
    details = [f"{properties.total_memory / GIBIBYTE:.0f} GiB", f"sm{properties.major}{properties.minor}"]
    if driver := _gpu_driver():
        details.append(f"driver {driver}")
    return properties.name, ", ".join(details)


def _gpu_driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        # A tool of the PATH, with arguments of our own.
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout  # nosec B603
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.partition("\n")[0].strip() or None


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    return versions


class PeakMemory:
    """Highest memory use since it was made, above what was in use then.

    On a GPU what torch allocated there; else the process's resident memory, which Linux alone tells. Memory that
    something else freed before and that is used again does not show.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before_bytes: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before_bytes = _status_bytes("VmRSS") if _reset_peak() else None

    def growth_bytes(self) -> int | None:
        if self._before_bytes is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before_bytes
        peak_bytes = _status_bytes("VmHWM")
        return None if peak_bytes is None else peak_bytes - self._before_bytes


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int | None:
    """A field of /proc/self/status, which counts in units of 1024 bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None
