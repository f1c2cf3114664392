"""A drill's findings as Markdown: what it ran on, and a table for each exercise."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import torch

from embedq.model.bench_report import table
from embedq.model.machine import describe_machine
from tests.chaos.drill_report import PACKAGES
from tests.ops.finding import Finding, Row
from tests.ops.world import LEASE_S, MAX_BATCH_TOKENS, MODEL

HEAD = ("", "found", "must be")


def markdown(findings: Sequence[Finding], redis_version: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, "prometheus_client"))
    lines = [
        *describe_machine(torch.device("cpu")).lines(),
        f"Redis {redis_version} with an append-only file, fsync at every write; {versions}",
        f"Workers with {MODEL}, slowed to a small GPU's pace, {MAX_BATCH_TOKENS:,} tokens a micro-batch, leases of"
        f" {LEASE_S:g} s",
    ]
    head = ["# Operations drill", "", *(f"- {line}" for line in lines), ""]
    return "\n".join([*head, *(part for finding in findings for part in _section(finding))])


def _section(finding: Finding) -> list[str]:
    rows = [(row.what, row.found, _wanted(row)) for row in finding.rows]
    return [f"## {finding.title}", "", *finding.notes, "", table(HEAD, rows), ""]


def _wanted(row: Row) -> str:
    return row.wanted if row.is_good else f"**not {row.wanted}**"
