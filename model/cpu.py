"""What this machine's CPU can do. Knows the operating system's list of features, no tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """Names as in Linux' /proc/cpuinfo, such as avx512f, avx512_bf16, avx512_vnni, amx_bf16; elsewhere none."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def describe(flags: frozenset[str]) -> str:
    """The features that decide an encoder's speed, for people."""
    names = {"avx512f": "AVX-512", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16", "amx_tile": "AMX"}
    return ", ".join(label for flag, label in names.items() if flag in flags) or "no AVX-512"
