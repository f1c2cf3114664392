"""Which texts are encoded together, and in which order. Pure: numbers in, numbers out; no clock, Redis or tensors.

The encoder packs tokens without padding, so a micro-batch costs what its tokens cost; texts of like length still
belong together, because attention runs over groups of near-equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Micro-batches' worth of the most urgent texts among which those of like length are looked for.
WINDOW_BATCHES = 4
#: So many later texts' micro-batches go before a text; from then on it comes first, whatever its length.
DUE_AFTER = 8
#: A queue's texts wait for those of the queue before it that come within so many micro-batches' tokens.
PRIORITY_BATCHES = 16
#: Of each job this share of a micro-batch counts as one turn: what is more gives way to jobs that come later.
TURN_SHARE = 1 / 4


def choose(
    keys: NDArray[np.float64], lengths: NDArray[np.int64], is_due: NDArray[np.bool_], max_tokens: int
) -> NDArray[np.int64]:
    """Indices of the next micro-batch: the most urgent text (the lowest key) and those nearest to it in length.

    keys, lengths (tokens), is_due: (n,) of the texts that wait, n > 0. At most `max_tokens`, unless it is one text.
    Texts that are due come first, in their order.
    """
    most_urgent = np.lexsort((keys, ~is_due))
    reach = np.searchsorted(np.cumsum(lengths[most_urgent]), WINDOW_BATCHES * max_tokens, side="right")
    window = most_urgent[: max(1, int(reach))]
    distance = np.abs(lengths[window] - lengths[window[0]])
    distance[is_due[window]] = -1
    ranked = window[np.lexsort((keys[window], distance))]
    fits = int(np.searchsorted(np.cumsum(lengths[ranked]), max_tokens, side="right"))
    return ranked[: max(1, fits)]


class ReadyJob(NamedTuple):
    """One job's texts as they come to wait."""

    #: an item of the caller's for each text, one at least
    items: Sequence[Any]
    #: tokens of each
    lengths: Sequence[int]
    #: texts of different kinds never share a micro-batch
    kind: int = 0
    #: of the job's queue among the worker's, 0 the most urgent
    rank: int = 0


@dataclass(slots=True)
class ReadyTexts:
    """The texts that wait for the encoder.

    Their order is that of arrival, with these differences: a queue of lower rank waits for the queues before it; a
    long job gives way, text by text, to jobs that come later; texts of like length go together, but once DUE_AFTER
    micro-batches with later texts went before a text, it comes first.
    """

    max_batch_tokens: int
    #: jobs that have no place in the order yet: where a micro-batch takes everything none needs one
    _fresh: list[ReadyJob] = field(default_factory=list)
    _num_fresh_tokens: int = 0
    _items: list[Any] = field(default_factory=list)
    _keys: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    _lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _kinds: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    #: whether each counts as claimed ahead: of a job only the first micro-batch's worth
    _is_ahead: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    #: whether each is the last of a job of more than that
    _ends_long_job: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    #: micro-batches with later texts that went before each
    _passed: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    #: tokens that have arrived, of each job no more than its turn
    _arrived: float = 0.0

    def __bool__(self) -> bool:
        return bool(self._items or self._fresh)

    @property
    def num_tokens(self) -> int:
        return int(self._lengths.sum()) + self._num_fresh_tokens

    def items(self) -> list[Any]:
        """All that wait, in no order."""
        return [*self._items, *(item for job in self._fresh for item in job.items)]

    @property
    def tokens_ahead(self) -> int:
        """Of each job no more than one micro-batch's worth: the rest gives way to what is claimed next."""
        fresh = sum([min(sum(job.lengths), self.max_batch_tokens) for job in self._fresh])
        return int(self._lengths[self._is_ahead].sum()) + fresh

    @property
    def num_long_jobs(self) -> int:
        """Jobs of more than a micro-batch that have texts waiting."""
        fresh = sum([sum(job.lengths) > self.max_batch_tokens for job in self._fresh])
        return int(self._ends_long_job.sum()) + fresh

    def add(self, jobs: Sequence[ReadyJob]) -> None:
        """In the order of their arrival."""
        self._fresh.extend(jobs)
        self._num_fresh_tokens += sum([sum(job.lengths) for job in jobs])

    def take(self, max_tokens: int | None = None) -> list[Any]:
        """The items of the next micro-batch, of at most `max_tokens` (None: the budget) unless it is one text.

        In the order of their arrival: a job's own stand together.
        """
        max_tokens = max_tokens or self.max_batch_tokens
        if not self._items and self._num_fresh_tokens <= max_tokens and len({job.kind for job in self._fresh}) == 1:
            return self._take_fresh()
        self._put_in_order()
        is_due = self._passed >= DUE_AFTER
        first = np.lexsort((self._keys, ~is_due))[0]
        alike = np.flatnonzero(self._kinds == self._kinds[first])
        chosen = alike[choose(self._keys[alike], self._lengths[alike], is_due[alike], max_tokens)]
        self._passed += self._keys < self._keys[chosen].max()
        chosen.sort()
        batch = [self._items[place] for place in chosen.tolist()]
        left = np.ones(len(self._items), np.bool_)
        left[chosen] = False
        self._keep(np.flatnonzero(left))
        return batch

    def _take_fresh(self) -> list[Any]:
        batch = [item for job in self._fresh for item in job.items]
        self._fresh, self._num_fresh_tokens = [], 0
        return batch

    def _put_in_order(self) -> None:
        """Gives the fresh jobs' texts their keys: the most urgent has the lowest."""
        jobs = self._fresh
        if not jobs:
            return
        counts = np.array([len(job.lengths) for job in jobs])
        lengths = np.array([length for job in jobs for length in job.lengths], np.int64)
        starts = np.cumsum(counts) - counts
        totals = np.add.reduceat(lengths, starts)
        turns = np.minimum(totals, TURN_SHARE * self.max_batch_tokens)
        ranks = np.array([job.rank for job in jobs]) * (PRIORITY_BATCHES * self.max_batch_tokens)
        arrivals = self._arrived + np.cumsum(turns) - turns + ranks
        before = np.cumsum(lengths) - lengths  # (texts,) tokens ahead of each; from the next line on of its own job
        before -= np.repeat(before[starts], counts)
        ends = starts + counts - 1
        ends_long_job = np.zeros(len(lengths), np.bool_)
        ends_long_job[ends[totals > self.max_batch_tokens]] = True
        self._items += self._take_fresh()
        self._arrived += float(turns.sum())
        self._keys = np.concatenate((self._keys, before + np.repeat(arrivals, counts)))
        self._lengths = np.concatenate((self._lengths, lengths))
        self._kinds = np.concatenate((self._kinds, np.repeat([job.kind for job in jobs], counts)))
        self._is_ahead = np.concatenate((self._is_ahead, before < self.max_batch_tokens))
        self._ends_long_job = np.concatenate((self._ends_long_job, ends_long_job))
        self._passed = np.concatenate((self._passed, np.zeros(len(lengths), np.int64)))

    def first(self) -> Any:
        """The most urgent item."""
        self._put_in_order()
        return self._items[np.lexsort((self._keys, self._passed < DUE_AFTER))[0]]

    def discard(self, is_wanted: Callable[[Any], bool]) -> None:
        """Drops the items for which `is_wanted` is false."""
        self._put_in_order()
        self._keep(np.array([place for place, item in enumerate(self._items) if is_wanted(item)], np.int64))

    def _keep(self, places: NDArray[np.int64]) -> None:
        self._items = [self._items[place] for place in places.tolist()]
        self._keys, self._passed, self._is_ahead = self._keys[places], self._passed[places], self._is_ahead[places]
        self._lengths, self._kinds = self._lengths[places], self._kinds[places]
        self._ends_long_job = self._ends_long_job[places]


class QueueTurns:
    """In which order a claim looks at the queues: as given, but now and then one of the later ones comes first.

    Without that a first queue that never runs dry would starve the others.
    """

    #: Of so many claims, one begins with a later queue.
    EVERY = 16

    def __init__(self) -> None:
        self._claims = 0

    def order(self, queues: Sequence[str]) -> list[str]:
        self._claims += 1
        turn, is_late = divmod(self._claims, self.EVERY)
        if is_late or len(queues) < 2:
            return list(queues)
        first = queues[1 + (turn - 1) % (len(queues) - 1)]
        return [first, *(queue for queue in queues if queue != first)]
