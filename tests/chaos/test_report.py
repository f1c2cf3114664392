"""What a chaos run tells at its end, and its exit status."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.chaos import __main__ as command
from tests.chaos.checks import Violation
from tests.chaos.ledger import Account, Ledger
from tests.chaos.plan import Plan
from tests.chaos.recovery import Recovery
from tests.chaos.report import Findings


class FakeRun:
    """Instead of half an hour: a job that finished, two kills, and these violations."""

    violations: tuple[Violation, ...] = ()

    def __init__(self, plan: Plan, folder: Path, _: Any) -> None:
        self._plan = plan
        (folder / "events.jsonl").write_text("")

    def findings(self) -> Findings:
        ledger = Ledger(self._plan)
        account = ledger.accounts["sync0-10"] = Account("sync0-10", 1.0, acked_at=1.0, attempts=2)
        ledger.settle(account, "finished 00", 2.0, ["1-0"], 60)
        recoveries = [
            Recovery("w0-1", 0.0, num_jobs=3, back_s=5.5, took_s=6.5, is_undisturbed=True, is_calm=True),
            Recovery("w1-1", 0.0, num_jobs=3, back_s=7.5, took_s=14.0),
        ]
        events = Counter(kill_worker=2, kill_redis=1)
        return Findings(self._plan, ledger, self.violations, recoveries, events, {-9: 2, 0: 1}, 3.0, "7.0.15")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> type[FakeRun]:
    class Run(FakeRun):
        pass

    monkeypatch.setattr(command, "Run", Run)
    return Run


def test_a_run_without_violations_writes_its_table_and_leaves_no_logs(run: type[FakeRun], tmp_path: Path) -> None:
    report = tmp_path / "chaos.md"
    told = CliRunner().invoke(command.main, ["--seconds", "60", "--seed", "7", "--report", str(report)])
    assert told.exit_code == 0, told.output
    text = report.read_text()
    assert "| jobs accepted | 1 |" in text
    assert "| jobs tried more than once, attempts beyond the first | 1, 2 |" in text
    assert "taken back, Redis and a worker alive | median 5.5 s, longest 5.5 s, of 1 kills |" in text
    assert "taken back, all | median 6.5 s, longest 7.5 s, of 2 kills |" in text
    assert "another worker, nobody else dead meanwhile | median 6.5 s, longest 6.5 s, of 1 kills |" in text
    assert "another worker, all | median 10.2 s, longest 14.0 s, of 2 kills |" in text
    assert "| workers' exits, number x status | 2 x -9, 1 x 0 |" in text
    assert "| **lost** | **0** |" in text
    assert "seed 7, 60 s" in text
    assert not Path(told.output.partition("logs in ")[2].splitlines()[0]).exists()


def test_a_violation_is_told_with_its_history_and_the_seed_and_fails_the_run(
    run: type[FakeRun], tmp_path: Path
) -> None:
    run.violations = (Violation("lost", "sync0-10", "it is gone"), Violation("stray", "a key", "nobody knows it"))
    logs = tmp_path / "logs"
    logs.mkdir()
    told = CliRunner().invoke(command.main, ["--seconds", "60", "--seed", "7", "--logs", str(logs)])
    assert told.exit_code == 1
    assert "lost: sync0-10: it is gone" in told.output
    assert "again: --seed 7 --seconds 60" in told.output
    assert (logs / "violations.txt").read_text().splitlines() == [
        "lost: sync0-10: it is gone",
        "stray: a key: nobody knows it",
    ]
