"""What the logs of a run say of one job: its producer's journal, and what happened meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.checks import Violation
from tests.chaos.journal import JournalReader
from tests.chaos.ledger import Ledger

#: Seconds before a job was enqueued from which events count as its own, and lines of them.
BEFORE_S, MAX_LINES = 2.0, 60


def history(violation: Violation, ledger: Ledger, folder: Path) -> str:
    """One line an event, in order of time; of what is no job only the violation itself."""
    account = ledger.accounts.get(violation.job_id)
    if account is None:
        return "(no job of this run)"
    job = ledger.job(account.job_id)
    until = account.ended_at or time.time()
    lines = sorted([*_journal(account.job_id, folder), *_events(account.meant_at - BEFORE_S, until, folder)])
    head = f"  {len(job.texts)} texts, poison {job.poison}, {dict(job.keywords)}; {account}"
    return "\n".join([head, *(f"  {at:.3f} {line}" for at, line in lines[:MAX_LINES])])


def _journal(job_id: str, folder: Path) -> Iterator[tuple[float, str]]:
    for path in folder.glob("*.journal"):
        for record in JournalReader(path).read():
            if job_id in record["ids"]:
                yield record["at"], f"producer: {record['kind']} {record['what']} {record.get('reply', '')}"


def _events(first: float, last: float, folder: Path) -> Iterator[tuple[float, str]]:
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if first <= event["at"] <= last + BEFORE_S:
            yield event.pop("at"), " ".join(f"{value}" for value in event.values() if value not in ("", 0))
