"""A drill's findings as Markdown: what it ran on, and one table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from embedq.model.bench_report import Row, table
from embedq.model.machine import describe_machine

#: Of what the drills exercise, beside what a machine's description names.
PACKAGES = ("rq", "redis")


def markdown(title: str, redis_version: str, notes: Sequence[str], head: Row, rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [*describe_machine(torch.device("cpu")).lines(), f"Redis {redis_version}; {versions}", *notes]
    return "\n".join([f"# {title}", "", *(f"- {line}" for line in lines), "", table(head, rows), ""])


def tell(text: str, report: Path | None) -> None:
    """Prints, and writes it down where somebody wants it."""
    print(text)
    if report is not None:
        report.write_text(text)
