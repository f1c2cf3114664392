"""What this machine's CPU is and can do. Knows the operating system's list of features, no tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """Names as in Linux' /proc/cpuinfo, such as avx512_bf16, avx512_vnni, amx_bf16, asimddp; elsewhere none."""
    fields = _fields()
    # "flags" on x86, "Features" on ARM
    return frozenset((fields.get("flags") or fields.get("Features", "")).split())


def cpu_name() -> str | None:
    """Such as `AMD EPYC`; None where the system does not tell."""
    return _fields().get("model name") or None


@cache
def _fields() -> dict[str, str]:
    """Of the first processor that Linux lists; elsewhere none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
