"""What a run came to, as a table for people."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from embedq.model.cpu import cpu_name
from tests.chaos.checks import Violation, count_kinds
from tests.chaos.draws import DEADLY
from tests.chaos.ledger import Ledger
from tests.chaos.plan import LEASE_S, NUM_WORKERS, Plan
from tests.chaos.recovery import Recovery

#: Kinds of violations, in the order in which they are told.
_KINDS = ("lost", "duplicated", "wrong", "stray", "slow", "process")


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a finished run knows."""

    plan: Plan
    ledger: Ledger
    violations: Sequence[Violation]
    recoveries: Sequence[Recovery]
    #: what was done, by its name: faults of the plan, and what the proxy made of them
    events: Mapping[str, int]
    #: how workers' processes ended, by exit status; a signal is a negative one
    exits: Mapping[int, int]
    #: seconds until everything had ended after the last fault
    rest_s: float
    redis_version: str


def _recovery_rows(recoveries: Sequence[Recovery]) -> Iterator[tuple[str, str]]:
    back, claimed = "a killed worker's jobs taken back", "claimed by another worker"
    undisturbed = [each.back_s for each in recoveries if each.is_undisturbed]
    yield f"{back}, Redis and a worker alive", _times(undisturbed)
    yield f"{back}, all", _times([each.back_s for each in recoveries])
    yield f"{claimed}, nobody else dead meanwhile", _times([each.took_s for each in recoveries if each.is_calm])
    yield f"{claimed}, all", _times([each.took_s for each in recoveries])


def _times(seconds: Sequence[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    if not known:
        return "none"
    return f"median {statistics.median(known):.1f} s, longest {max(known):.1f} s, of {len(known)} kills"


def rows(findings: Findings) -> list[tuple[str, str]]:
    ledger, events = findings.ledger, findings.events
    counts, ended = ledger.counts, ledger.ended
    found = count_kinds(findings.violations)
    accepted = sum(1 for _ in ledger.acked())
    retried = [account.attempts for account in ledger.accounts.values() if account.attempts]
    deaths = ", ".join(f"{number} x {status}" for status, number in sorted(findings.exits.items()))
    return [
        ("jobs accepted", f"{accepted:,}"),
        *((f"jobs {status}", f"{ended[status]:,}") for status in ("finished", "failed", "canceled")),
        ("jobs tried more than once, attempts beyond the first", f"{len(retried):,}, {sum(retried):,}"),
        ("jobs with a text of poison", f"{sum(1 for account in ledger.accounts.values() if account.poison):,}"),
        ("jobs that ended processes, and failed; of these with their text named", _blamed(ledger)),
        ("enqueued twice on purpose", f"{counts['double done']:,}"),
        ("calls that failed and were made again", f"{sum(n for k, n in counts.items() if k.endswith('raised')):,}"),
        (
            "workers killed, stopped past the lease, terminated",
            _three(events, "kill_worker", "stop_worker", "term_worker"),
        ),
        ("Redis killed, stopped", f"{events['kill_redis']}, {events['stop_redis']}"),
        ("producers killed", str(events["kill_producer"])),
        ("cuts of all connections, by the proxy and by Redis", f"{events['cut']}, {events['client_kill']}"),
        ("requests lost, torn; replies lost", _three(events, "lost_request", "torn_request", "lost_reply")),
        ("times of delay, of silence; scripts flushed", _three(events, "delay", "stall", "script_flush")),
        ("workers' exits, number x status", deaths),
        *_recovery_rows(findings.recoveries),
        ("seconds until all was at rest after the last fault", f"{findings.rest_s:.0f}"),
        *((f"**{kind}**", f"**{found[kind]}**") for kind in _KINDS),
    ]


def _blamed(ledger: Ledger) -> str:
    """Deadly jobs that failed, and how many of them name the text at fault."""
    failed = [each for each in ledger.accounts.values() if each.poison in DEADLY and each.status == "failed"]
    named = sum(1 for account in failed if (account.verdict or "").endswith(f" {account.poison_index}"))
    return f"{len(failed)}, {named}"


def _three(events: Mapping[str, int], *names: str) -> str:
    return ", ".join(str(events[name]) for name in names)


def machine(findings: Findings) -> list[str]:
    plan = findings.plan
    return [
        f"seed {plan.seed}, {plan.seconds:g} s, {NUM_WORKERS} workers with leases of {LEASE_S:g} s,"
        f" {len(plan.producers)} producers",
        f"{cpu_name() or platform.processor()}, {os.cpu_count()} cores, Linux {platform.release()}",
        f"Python {platform.python_version()}, redis-py {version('redis')}, RQ {version('rq')},"
        f" Redis {findings.redis_version} with an append-only file, fsync at every write",
    ]


def markdown(findings: Findings) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows(findings))
    notes = "\n".join(f"- {line}" for line in machine(findings))
    return f"# A run of the chaos suite\n\n| | |\n|---|---|\n{table}\n\n{notes}\n"
