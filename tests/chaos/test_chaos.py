"""A short run of the chaos suite: every kind of fault once at least."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.history import history
from tests.chaos.plan import RATES, plan
from tests.chaos.run import Run

SEED, SECONDS = 20_261_123, 30
#: What a busy machine may make of the plan: faults whose victim was not there in time.
MISSABLE = {"kill_worker", "stop_worker", "term_worker"}


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_dies_every_job_ends_once_with_what_its_texts_ask_for(tmp_path: Path) -> None:
    findings = Run(plan(SEED, SECONDS), tmp_path / "run").findings()
    told = [f"{each}\n{history(each, findings.ledger, tmp_path / 'run')}" for each in findings.violations]
    assert not told, "\n".join([f"seed {SEED}, {SECONDS} s", *told])
    assert findings.ledger.ended["finished"] > 500
    assert findings.ledger.ended["failed"] > 0
    assert findings.ledger.ended["canceled"] > 0
    assert {kind for kind in RATES if findings.events[kind]} >= set(RATES) - MISSABLE
