"""What a worker tells of its work while it does it: an event a micro-batch, publication or round, never one a text.

Knows the events. Whoever wants to know of them overrides what he needs; `Observer` itself ignores them all. Called from
the threads that do the work, which wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from embedq.worker.claims import Claim, Outcome, Recovered
    from embedq.worker.engine import Piece, Work


class Encoded(NamedTuple):
    """One micro-batch that has been on the device. What the jobs say of their earlier micro-batches is as before it."""

    pieces: Sequence[Piece]
    #: the jobs that they are of
    works: Collection[Work]
    num_tokens: int
    #: on the monotonic clock
    began_at: float
    took_s: float


class Observer:
    def claimed(self, claims: Sequence[Claim]) -> None:
        """Jobs were claimed, one at least."""

    def tokenized(self, took_s: float) -> None:
        """Jobs of one claim were read and tokenized."""

    def encoded(self, batch: Encoded) -> None: ...

    def published(self, outcomes: Sequence[Outcome], took_s: float) -> None:
        """Redis has taken them; what each came to there is in it."""

    def canceled(self, claims: Sequence[Claim]) -> None:
        """Jobs in hand turned out to be canceled; each once."""

    def stopped(self, claim: Claim, code: str) -> None:
        """A job in hand was made to fail from outside."""

    def released(self, claims: Sequence[Claim]) -> None:
        """Jobs were given back to their queues."""

    def recovered(self, queue: str, recovered: Recovered) -> None:
        """Jobs of dead workers were taken back from them."""

    def renewed(self, *, is_late: bool) -> None:
        """The leases were renewed, later than they should have been or not."""

    def kept_waiting(self) -> None:
        """Something that is to be told to Redis waits for it."""


class Observers(Observer):
    """Tells several."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def claimed(self, claims: Sequence[Claim]) -> None:
        self._tell(lambda observer: observer.claimed(claims))

    def tokenized(self, took_s: float) -> None:
        self._tell(lambda observer: observer.tokenized(took_s))

    def encoded(self, batch: Encoded) -> None:
        self._tell(lambda observer: observer.encoded(batch))

    def published(self, outcomes: Sequence[Outcome], took_s: float) -> None:
        self._tell(lambda observer: observer.published(outcomes, took_s))

    def canceled(self, claims: Sequence[Claim]) -> None:
        self._tell(lambda observer: observer.canceled(claims))

    def stopped(self, claim: Claim, code: str) -> None:
        self._tell(lambda observer: observer.stopped(claim, code))

    def released(self, claims: Sequence[Claim]) -> None:
        self._tell(lambda observer: observer.released(claims))

    def recovered(self, queue: str, recovered: Recovered) -> None:
        self._tell(lambda observer: observer.recovered(queue, recovered))

    def renewed(self, *, is_late: bool) -> None:
        self._tell(lambda observer: observer.renewed(is_late=is_late))

    def kept_waiting(self) -> None:
        self._tell(lambda observer: observer.kept_waiting())

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            event(observer)
