"""What must hold of a run, and how a breach is told. Pure: looks at what was read of Redis, job by job and as a whole.

A job is `lost` if nobody will ever hear of it or it failed for no fault of its own, `duplicated` if it ended or ran
more than once where that shows, `wrong` if its outcome is not the one that its texts ask for. A key that nothing
explains is a `stray`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embedq.model import NoopEncoder
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import EmbedqError, JobFailedError
from embedq.producer.outcomes import entry_outcome
from tests.chaos.draws import DEADLY, Job, Poison
from tests.chaos.ledger import Account
from tests.chaos.produce import verdict_of
from tests.chaos.recovery import Recovery

Kind = Literal["lost", "duplicated", "wrong", "stray", "slow", "process"]

#: Numbers in a vector of the runs' stand-in: 64 texts of float32 make a result that is staged, most are not.
EMBEDDING_DIM = 128
MODEL = f"noop:{EMBEDDING_DIM}"
#: Codes with which workers' deaths may fail a job that has few retries.
LAST_WORDS: frozenset[str] = frozenset({"hung", "device_lost"})
DEATHS = LAST_WORDS | {"abandoned"}
#: Codes with which each kind of poison fails.
CODES: dict[Poison, frozenset[str]] = {
    "raise": frozenset({"encode_failed"}),
    "nan": frozenset({"non_finite"}),
    "oom": frozenset({"out_of_memory"}),
    "tokenize-raise": frozenset({"internal"}),
    "tokenize-abort": frozenset({"abandoned"}),
    "abort": frozenset({"abandoned"}),
    "exit": frozenset({"abandoned"}),
    # Or the worker died with its last words unsaid.
    "lost-device": frozenset({"device_lost", "abandoned"}),
    "hang": frozenset({"hung", "abandoned"}),
}
#: Seconds within which another worker must have a killed one's jobs in hand, with a lease of 5 s.
RECOVERY_LIMIT_S = 10.0
#: Poison whose text is always named.
NAMED: frozenset[Poison] = frozenset({"raise", "nan", "oom"})

_ENTRY_TYPES = {b"finished": b"1", b"failed": b"2", b"canceled": b"3"}

Entry = tuple[bytes, dict[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Violation:
    kind: Kind
    #: or a key, or a process
    job_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.job_id}: {self.what}"


@dataclass(frozen=True, slots=True)
class Deaths:
    """What may have cost a job attempts: processes that died, and leases that ran out where nobody did."""

    #: since it was enqueued, by whatever cause
    all: int
    #: of these, shortly before its end, those that had nothing to do with the job
    from_outside: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One job as Redis has it in one moment."""

    status: bytes | None
    ended_at: float
    ttl_s: int
    entries: Sequence[Entry]
    has_executions: bool
    #: attempts that it was charged with beyond its last
    attempts: int = 0


@cache
def _encoder() -> NoopEncoder:
    return NoopEncoder(EMBEDDING_DIM)


def reference(job: Job) -> NDArray[np.generic]:
    """(n, d) what a worker must give for a job, without queue, batches or engine."""
    encoder = _encoder()
    tokens = encoder.tokenize(job.texts, prompt=job.keywords.get("prompt") or "")
    return encoder.postprocess(
        encoder.encode_tokens(tokens),
        dimensions=job.keywords.get("dimensions"),
        precision=job.keywords.get("precision", "float32"),
    )


def verdict_of_entry(job_id: str, entry: Entry) -> tuple[str, Embeddings | EmbedqError]:
    outcome = entry_outcome(job_id, entry[1])
    return (verdict_of(outcome), outcome)


def check_ended(job: Job, seen: Seen, deaths: Deaths) -> Iterator[Violation]:
    """A job that has ended, when it is seen so first."""
    if len(seen.entries) != 1:
        kind: Kind = "duplicated" if seen.entries else "lost"
        yield Violation(kind, job.id, f"{_text(seen.status)} with {len(seen.entries)} entries in its result stream")
    if seen.has_executions:
        yield Violation("stray", job.id, "it has ended and still has executions")
    ttl_s = job.result_ttl if seen.status == b"finished" else job.failure_ttl
    if not 0 <= seen.ttl_s <= ttl_s:
        yield Violation("stray", job.id, f"it is kept for {seen.ttl_s} s, not {ttl_s} s")
    if not seen.entries:
        return
    entry = seen.entries[-1]
    if entry[1].get(b"type") != _ENTRY_TYPES.get(seen.status or b""):
        yield Violation("wrong", job.id, f"{_text(seen.status)} with a result of type {entry[1].get(b'type')!r}")
        return
    if check := _CHECKS.get(seen.status or b""):
        yield from check(job, entry, deaths)


def _check_finished(job: Job, entry: Entry, deaths: Deaths) -> Iterator[Violation]:
    outcome = entry_outcome(job.id, entry[1])
    if not isinstance(outcome, Embeddings):
        yield Violation("wrong", job.id, f"its result cannot be read: {outcome}")
        return
    wanted = reference(job)
    got = outcome.vectors
    if got.dtype != wanted.dtype or got.shape != wanted.shape or got.tobytes() != wanted.tobytes():
        yield Violation("wrong", job.id, f"vectors {got.dtype}{got.shape} are not those of its texts")
    if not job.is_innocent:
        yield Violation("wrong", job.id, f"it finished, with a text of poison {job.poison}")


def _check_failed(job: Job, entry: Entry, deaths: Deaths) -> Iterator[Violation]:
    outcome = entry_outcome(job.id, entry[1])
    if not isinstance(outcome, JobFailedError):
        yield Violation("wrong", job.id, f"its failure cannot be read: {outcome}")
        return
    # Last words are published before their process ends, and may be read before that is seen.
    num_deaths = deaths.all + (outcome.code in LAST_WORDS)
    is_death = outcome.code in DEATHS and num_deaths > job.retries
    if job.is_innocent or job.poison is None:
        if not is_death:
            what = f"an innocent job failed: {outcome}; {deaths.all} deaths, {job.retries} retries"
            yield Violation("lost", job.id, what)
        return
    if outcome.code not in CODES[job.poison] and not is_death:
        yield Violation("wrong", job.id, f"poison {job.poison} failed with {outcome.code}")
    if not _may_name(job, job.poison, outcome, deaths, is_death=is_death):
        what = f"poison {job.poison} is text {job.poison_index}, the failure names {outcome.text_index}: {outcome}"
        yield Violation("wrong", job.id, what)


def _may_name(job: Job, poison: Poison, outcome: JobFailedError, deaths: Deaths, *, is_death: bool) -> bool:
    """Whether the failure names the right text, or none where nothing can know it."""
    if outcome.text_index == job.poison_index:
        return True
    if poison in DEADLY:
        # Who dies from outside while it tries texts one by one has begun with one, or with none yet.
        return deaths.from_outside > 0 or (job.retries == 0 and outcome.text_index is None)
    return (poison not in NAMED and outcome.text_index is None) or is_death


_CHECKS = {b"finished": _check_finished, b"failed": _check_failed}


def check_again(account: Account, seen: Seen) -> Iterator[Violation]:
    """A job seen ended before must be as it was."""
    if _text(seen.status) != account.status:
        yield Violation("duplicated", account.job_id, f"it was {account.status} and is {_text(seen.status)}")
    entry_ids = tuple(entry_id.decode() for entry_id, _ in seen.entries)
    if entry_ids != account.entry_ids:
        yield Violation("duplicated", account.job_id, f"entries {account.entry_ids} have become {entry_ids}")


def check_account(account: Account) -> Iterator[Violation]:
    """Once all is known: what clients did and were told is what is in Redis."""
    if account.told is not None and account.verdict is not None and account.told not in (account.verdict, "gone"):
        yield Violation("wrong", account.job_id, f"a client was told {account.told}, in Redis is {account.verdict}")
    if account.was_canceled_for_sure and account.status != "canceled":
        yield Violation("wrong", account.job_id, f"it was canceled and is {account.status}")
    if account.status == "canceled" and not account.may_be_canceled:
        yield Violation("wrong", account.job_id, "it is canceled, and nobody canceled it")


@dataclass(frozen=True, slots=True)
class Places:
    """All places of one queue in one moment: ids, and of registries their scores."""

    at: float
    waiting: Sequence[str]
    #: of the pairs `job:execution`
    started: Sequence[str]
    finished: dict[str, float]
    failed: dict[str, float]
    canceled: dict[str, float]
    #: of what else a job may wait in, by its name: members
    pending: dict[str, Sequence[str]]
    sequels: Sequence[str]


def check_places(places: Places) -> Iterator[Violation]:
    """At any moment: no job stands twice anywhere, or in two places."""
    started = [pair.rpartition(":")[0] for pair in places.started]
    where: dict[str, list[str]] = {}
    for name, ids in {"waiting": places.waiting, "started": started, **places.pending}.items():
        for job_id, times in Counter(ids).items():
            where.setdefault(job_id, []).extend([name] * times)
    for name in ("finished", "failed", "canceled"):
        members: dict[str, float] = getattr(places, name)
        for job_id, score in members.items():
            if score > places.at or name == "canceled":
                where.setdefault(job_id, []).append(name)
    for job_id, names in where.items():
        if len(names) > 1:
            yield Violation("duplicated", job_id, f"it stands in {', '.join(names)}")


def check_registries(places: Places, kept: dict[str, set[str]], ended: dict[str, set[str]]) -> Iterator[Violation]:
    """The registries hold what has ended so. By status, `kept`: what must be there still; `ended`: what may."""
    for status, must in kept.items():
        members: dict[str, float] = getattr(places, status)
        for job_id in must - members.keys():
            yield Violation("lost", job_id, f"it is {status} and not in that registry")
        for job_id in members.keys() - ended[status]:
            yield Violation("stray", job_id, f"it is in the registry of {status} jobs and is none")


def check_at_rest(places: Places) -> Iterator[Violation]:
    """Once everything has ended."""
    everywhere = {"waiting": places.waiting, "started": places.started, "the sequels": places.sequels, **places.pending}
    for what, members in everywhere.items():
        for member in members:
            yield Violation("stray", member, f"at rest it is still in {what}")


def check_recoveries(recoveries: Iterable[Recovery]) -> Iterator[Violation]:
    """A killed worker's jobs are taken back in time where Redis was there and a worker to do it; and are in other hands
    in time where nobody else died meanwhile.
    """
    for recovery in recoveries:
        who, last = f"its {recovery.num_jobs} jobs", f"the last {recovery.latest}"
        if recovery.is_undisturbed and (recovery.back_s or 0) >= RECOVERY_LIMIT_S:
            yield Violation("slow", recovery.worker, f"{who} were taken back after {recovery.back_s:.1f} s, {last}")
        elif recovery.is_calm and (recovery.took_s or 0) >= RECOVERY_LIMIT_S:
            yield Violation("slow", recovery.worker, f"{who} were claimed again after {recovery.took_s:.1f} s, {last}")


def count_kinds(violations: Iterable[Violation]) -> Counter[str]:
    return Counter(violation.kind for violation in violations)


def _text(status: bytes | None) -> str:
    return "gone" if status is None else status.decode(errors="replace")
