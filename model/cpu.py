"""What this machine's CPU can do. Knows the operating system's list of features, no tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """Names as in Linux' /proc/cpuinfo, such as avx512_bf16, avx512_vnni, amx_bf16, asimddp; elsewhere none."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on ARM
    return frozenset(
        next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ())
    )
