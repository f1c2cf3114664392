"""Looks at every job from outside, while the run goes on and at its end, and keeps the ledger.

Reads Redis by a connection of its own, past the bad network, in pipelines; says nothing itself of what is right
(`checks`). One thread.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import redis

from embedq.producer import keys
from embedq.producer.client import DEFAULT_QUEUE
from tests.chaos.checks import (
    Deaths,
    Places,
    Seen,
    Violation,
    check_account,
    check_again,
    check_at_rest,
    check_ended,
    check_places,
    check_registries,
    verdict_of_entry,
)
from tests.chaos.journal import JournalReader
from tests.chaos.keyspace import Key, strays
from tests.chaos.ledger import Account, Ledger

#: Commands in one pipeline.
CHUNK = 500
#: Of a job's time to live, the share after which it is looked at again.
AGAIN_SHARE = 0.6
#: Seconds after its time to live at which a job must have vanished, and around it in which it may.
VANISH_S = 3.0
#: Seconds between two looks at all places.
PLACES_EVERY_S = 15.0
#: Jobs looked at again or for the last time in one round.
MAX_REVISITS = 2_000

_ENDED = (b"finished", b"failed", b"canceled", b"stopped")


class Audit:
    """`round` at short intervals, `close` once when all is at rest. `deaths`: between two moments."""

    def __init__(
        self,
        client: redis.Redis,
        ledger: Ledger,
        journals: Iterable[JournalReader],
        deaths: Callable[[float, float], Deaths],
        queue: str = DEFAULT_QUEUE,
    ) -> None:
        self._redis: Any = client
        self.ledger = ledger
        self._journals = list(journals)
        self._deaths = deaths
        self._queue = queue
        self.violations: list[Violation] = []
        #: jobs after whose end something was still to be done in the last round
        self.num_sequels = 0
        self._next_places = 0.0
        #: ended jobs in the order in which they were seen, to be looked at again and to vanish
        self._to_revisit: list[Account] = []
        self._to_vanish: list[Account] = []

    def round(self) -> None:
        """Raises redis-py's errors; what is not done then is done in the next round."""
        self.read_journals()
        self._look_at_open()
        self._look_again(time.time())
        self._look_for_vanished(time.time())
        self.num_sequels = self._redis.zcard(keys.sequels(self._queue))
        if time.time() >= self._next_places:
            self.violations += check_places(self.places())
            self._next_places = time.time() + PLACES_EVERY_S

    def read_journals(self) -> None:
        for journal in self._journals:
            for record in journal.read():
                self.ledger.add(record)

    def close(self) -> None:
        """Once nothing is under way any more: everything again, and as a whole."""
        self.round()
        self._look_again(time.time(), every=True)
        for job_id in self.ledger.open:
            if self.ledger.accounts[job_id].acked_at is not None:
                self._report("lost", job_id, "it was accepted and has not ended")
        for job_id in self.ledger.misread:
            self._report("wrong", job_id, "its id was given to another request, or refused to its own")
        for account in self.ledger.accounts.values():
            self.violations += check_account(account)
        places = self.places()
        self.violations += itertools.chain(
            check_places(places), check_at_rest(places), self._check_registries(places), self._strays()
        )

    # --- job by job

    def _look_at_open(self) -> None:
        ids = list(self.ledger.open)
        for some in _chunks(ids, CHUNK):
            statuses = self._ask([("HGET", keys.job(job_id), "status") for job_id in some])
            ended = [job_id for job_id, status in zip(some, statuses, strict=True) if status in _ENDED]
            missing = [job_id for job_id, status in zip(some, statuses, strict=True) if status is None]
            for job_id, seen in self._see(ended):
                self._settle(self.ledger.accounts[job_id], seen)
            for job_id in missing:
                self._miss(self.ledger.accounts[job_id])

    def _settle(self, account: Account, seen: Seen) -> None:
        job = self.ledger.job(account.job_id)
        self.violations += check_ended(job, seen, self._deaths(account.meant_at, seen.ended_at))
        verdict = (seen.status or b"gone").decode()
        if seen.entries and verdict != "canceled":
            verdict = verdict_of_entry(account.job_id, seen.entries[-1])[0]
        ttl_s = job.result_ttl if verdict.startswith("finished") else job.failure_ttl
        entry_ids = [entry_id.decode() for entry_id, _ in seen.entries]
        self.ledger.settle(account, verdict, seen.ended_at, entry_ids, ttl_s)
        account.attempts = seen.attempts
        account.poison, account.poison_index = job.poison, job.poison_index
        self._to_revisit.append(account)
        self._to_vanish.append(account)

    def _miss(self, account: Account) -> None:
        """No hash: not enqueued yet, or lost."""
        if account.acked_at is None:
            return
        if account.is_missed:
            self.ledger.settle(account, "lost", time.time(), (), 0)
            self._report("lost", account.job_id, "it was accepted and is not there")
        account.is_missed = True

    def _look_again(self, now: float, *, every: bool = False) -> None:
        """The second look at ended jobs; with `every`, at all that are still kept."""
        due, later = [], []
        for account in self._to_revisit:
            is_due = every or now >= account.ended_at + AGAIN_SHARE * account.ttl_s
            (due if is_due and (every or len(due) < MAX_REVISITS) else later).append(account)
        if every:
            due = [a for a in self.ledger.accounts.values() if not a.is_open and not a.has_vanished and a.ttl_s]
        kept = [account for account in due if account.ended_at + account.ttl_s > time.time() + VANISH_S]
        for job_id, seen in self._see([account.job_id for account in kept]):
            self.violations += check_again(self.ledger.accounts[job_id], seen)
        self._to_revisit = later

    def _look_for_vanished(self, now: float) -> None:
        due, later = [], []
        for account in self._to_vanish:
            is_due = now > account.kept_until + VANISH_S and len(due) < MAX_REVISITS
            (due if is_due else later).append(account)
        for some in _chunks(due, CHUNK):
            found = self._ask([("EXISTS", *_job_keys(account.job_id)) for account in some])
            for account, number in zip(some, found, strict=True):
                account.has_vanished = True
                if number:
                    self._report(
                        "stray", account.job_id, f"{number} of its keys outlived its time of {account.ttl_s} s"
                    )
        self._to_vanish = later

    def _see(self, job_ids: Sequence[str]) -> Iterator[tuple[str, Seen]]:
        for some in _chunks(job_ids, CHUNK):
            commands: list[tuple[Any, ...]] = []
            for job_id in some:
                commands.append(("HMGET", keys.job(job_id), "status", "ended_at", "embedq_attempts"))
                commands.append(("TTL", keys.job(job_id)))
                commands.append(("XRANGE", keys.results(job_id), "-", "+"))
                commands.append(("EXISTS", keys.executions(job_id)))
            # In one transaction: between two commands a job may end.
            replies = iter(self._ask(commands, transaction=True))
            for job_id in some:
                (status, ended_at, attempts), ttl_s, entries, executions = (next(replies) for _ in range(4))
                yield job_id, Seen(status, _seconds(ended_at), ttl_s, entries, bool(executions), int(attempts or 0))

    # --- as a whole

    def places(self) -> Places:
        queue = self._queue
        pending = {
            "the intermediate list": ("LRANGE", f"{keys.queue(queue)}:intermediate", 0, -1),
            "the scheduled registry": ("ZRANGE", keys.scheduled(queue), 0, -1),
            "the deferred registry": ("ZRANGE", keys.deferred(queue), 0, -1),
            "the registry of jobs that need not wait any longer": ("ZRANGE", f"{keys.PREFIX}:ready:{queue}", 0, -1),
        }
        scored = [("ZRANGE", name(queue), 0, -1, "WITHSCORES") for name in (keys.finished, keys.failed, keys.canceled)]
        lists = [("LRANGE", keys.queue(queue), 0, -1), ("ZRANGE", keys.started(queue), 0, -1)]
        lists.append(("ZRANGE", keys.sequels(queue), 0, -1))
        waiting, started, sequels, finished, failed, canceled, *others = self._ask(
            [*lists, *scored, *pending.values()], transaction=True
        )
        return Places(
            time.time(),
            _decoded(waiting),
            _decoded(started),
            _scores(finished),
            _scores(failed),
            _scores(canceled),
            {what: _decoded(members) for what, members in zip(pending, others, strict=True)},
            _decoded(sequels),
        )

    def _check_registries(self, places: Places) -> Iterator[Violation]:
        statuses = ("finished", "failed", "canceled")
        kept = {status: self.ledger.kept(status, places.at, VANISH_S) for status in statuses}
        ended: dict[str, set[str]] = {status: set() for status in statuses}
        for account in self.ledger.accounts.values():
            if account.status in ended:
                ended[account.status].add(account.job_id)
        return check_registries(places, kept, ended)

    def _strays(self) -> Iterator[Violation]:
        names = list(self._redis.scan_iter(match="*", count=CHUNK))
        found = []
        for some in _chunks(names, CHUNK):
            times = self._ask([("TTL", name) for name in some])
            found += [Key(name.decode(), ttl_s) for name, ttl_s in zip(some, times, strict=True) if ttl_s != -2]
        return strays(found, self._queue, self._is_kept)

    def _is_kept(self, job_id: str) -> bool:
        account = self.ledger.accounts.get(job_id)
        return account is not None and account.kept_until + VANISH_S > time.time()

    def _report(self, kind: Any, job_id: str, what: str) -> None:
        self.violations.append(Violation(kind, job_id, what))

    def _ask(self, commands: Sequence[tuple[Any, ...]], *, transaction: bool = False) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=transaction)
        for command in commands:
            pipeline.execute_command(*command)
        return list(pipeline.execute())


def _job_keys(job_id: str) -> list[str]:
    of_jobs = (keys.job, keys.results, keys.executions, keys.dependents, keys.dependencies)
    return [key_of(job_id) for key_of in of_jobs]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _decoded(members: Iterable[bytes]) -> list[str]:
    return [member.decode(errors="replace") for member in members]


def _scores(pairs: Iterable[Any]) -> dict[str, float]:
    return {member.decode(errors="replace"): score for member, score in pairs}


def _seconds(moment: bytes | None) -> float:
    """Since 1970, of a time as RQ writes it."""
    return datetime.fromisoformat(moment.decode()).timestamp() if moment else 0.0
