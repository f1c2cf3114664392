"""What is known of every job of a run: what producers meant, what they were told, and what was seen in Redis.

Built from the producers' journals and filled by the audit. Knows no Redis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.chaos.draws import LINGER_S, Job, draw_job, parse_id
from tests.chaos.journal import Record
from tests.chaos.plan import Plan


@dataclass(slots=True)
class Account:
    """One job. Times are seconds since 1970."""

    job_id: str
    meant_at: float
    acked_at: float | None = None
    #: when a client last tried to enqueue it
    enqueued_at: float = 0.0
    cancels_meant: int = 0
    cancels_raised: int = 0
    #: what cancellations were answered: true, false, "gone"
    cancel_replies: tuple[object, ...] = ()
    #: what a waiting client was told
    told: str | None = None
    #: how it ended: a word as `produce.verdict_of` has it; None while nobody has seen it ended
    verdict: str | None = None
    ended_at: float = 0.0
    #: of the result stream, as first seen
    entry_ids: tuple[str, ...] = ()
    ttl_s: int = 0
    #: attempts that it was charged with beyond its last
    attempts: int = 0
    #: the kind of poison in it, and the text's place; known once it has ended
    poison: str | None = None
    poison_index: int | None = None
    has_vanished: bool = False
    #: a first look found no job where one should be; the second counts
    is_missed: bool = False

    @property
    def is_open(self) -> bool:
        return self.verdict is None

    @property
    def was_canceled_for_sure(self) -> bool:
        return True in self.cancel_replies

    @property
    def may_be_canceled(self) -> bool:
        """Whether a cancellation was meant that was not surely too late."""
        if not self.cancels_meant:
            return False
        return (
            self.was_canceled_for_sure or self.cancels_meant > 1 or self.cancels_raised > 0 or not self.cancel_replies
        )

    @property
    def kept_until(self) -> float:
        """When it must have vanished; it may be kept longer than it asked for where somebody enqueued it again."""
        return max(self.ended_at + self.ttl_s, self.enqueued_at + LINGER_S)

    @property
    def status(self) -> str:
        return (self.verdict or "open").partition(" ")[0]


class Ledger:
    """For one thread."""

    def __init__(self, plan: Plan) -> None:
        self._seed = plan.seed
        self._one_text = {producer.name: producer.group > 1 for producer in plan.producers}
        self.accounts: dict[str, Account] = {}
        #: job ids whose verdict is still to be seen
        self.open: set[str] = set()
        #: ids that another request was given, or that their own was refused
        self.misread: list[str] = []
        #: of the journals' lines, by kind and what they say of it
        self.counts: Counter[str] = Counter()
        #: jobs by how they ended
        self.ended: Counter[str] = Counter()

    def job(self, job_id: str) -> Job:
        """Raises ValueError or KeyError for an id that is none of the run's."""
        producer, number = parse_id(job_id)
        return draw_job(self._seed, producer, number, one_text=self._one_text[producer])

    def add(self, record: Record) -> None:
        """One line of a journal."""
        what, kind = record["what"], record["kind"]
        self.counts[f"{kind} {what}"] += 1
        for job_id in record["ids"]:
            account = self.accounts.get(job_id)
            if account is None:
                account = self.accounts[job_id] = Account(job_id, record["at"])
                self.open.add(job_id)
            self._add(account, what, kind, record)

    def settle(self, account: Account, verdict: str, ended_at: float, entry_ids: Iterable[str], ttl_s: int) -> None:
        account.verdict, account.ended_at, account.ttl_s = verdict, ended_at, ttl_s
        account.entry_ids = tuple(entry_ids)
        self.open.discard(account.job_id)
        self.ended[account.status] += 1

    def acked(self) -> Iterator[Account]:
        return (account for account in self.accounts.values() if account.acked_at is not None)

    def kept(self, status: str, now: float, slack_s: float) -> set[str]:
        """Ids of the jobs of this status that Redis must still keep, whichever way clocks are read."""
        return {
            account.job_id
            for account in self.accounts.values()
            if account.status == status and account.ended_at + account.ttl_s > now + slack_s
        }

    def _add(self, account: Account, what: str, kind: str, record: Record) -> None:
        if kind in ("enqueue", "double"):
            account.enqueued_at = record["at"]
        match kind, what:
            case (("enqueue" | "double" | "rival"), "done"):
                if (record["reply"] == "accepted") == (kind == "rival"):
                    self.misread.append(account.job_id)
                if kind == "enqueue":
                    account.acked_at = record["at"]
            case "cancel", "meant":
                account.cancels_meant += 1
            case "cancel", "raised":
                account.cancels_raised += 1
            case "cancel", "done":
                account.cancel_replies += (record["reply"],)
            case "result", _:
                account.told = record["reply"]
            case _:
                pass
