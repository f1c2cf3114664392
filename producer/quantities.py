"""Counts, seconds, bytes and shares as people read them: short, with a unit. Pure."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """`1,234`, and from a hundred thousand on `123k`, `12.3M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 100 * size or (unit != "k" and number >= size):
            return f"{number / size:.0f}{unit}" if number >= 100 * size else f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"


def rate(per_second: float | None) -> str:
    """Without a unit; `-` where it is not known."""
    if per_second is None:
        return "-"
    return f"{per_second:.1f}" if 0 < per_second < 10 else count(per_second)


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min`, `2.5 h`, `4 d`; `-` where it is not known, and `endless`."""
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "endless"
    if seconds < 120:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{seconds:.0f} s"
    for unit, size, most in (("min", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def size(num_bytes: float) -> str:
    """`12 MB`, in powers of 1024 as Redis counts."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}" if unit == "GB" else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TB"


def share(part: float) -> str:
    return f"{100 * part:.0f}%"
