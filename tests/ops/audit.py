"""What became of a load's jobs, looked at from outside: one end, one result, the right vectors, and when.

Reads Redis; knows nothing of workers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedq.model import NoopEncoder
from embedq.producer import EmbedQueue, keys
from tests.ops.load import texts_of
from tests.ops.places import until

#: Jobs fetched in one call.
CHUNK_JOBS = 500
#: Statuses of jobs that have ended.
ENDED = frozenset({"finished", "failed", "canceled"})


@dataclass(slots=True)
class Account:
    """Of a load's jobs."""

    num_jobs: int
    #: ids of jobs that failed, with the reason
    failed: dict[str, str] = field(default_factory=dict)
    #: ids of jobs that Redis had accepted and that have no result
    lost: list[str] = field(default_factory=list)
    #: ids of jobs with more results than one
    duplicated: list[str] = field(default_factory=list)
    #: ids of jobs with vectors that are not theirs
    wrong: list[str] = field(default_factory=list)
    #: seconds since 1970 by the server's clock, ascending
    finished_at: list[float] = field(default_factory=list)
    #: results by the worker that wrote them
    by_worker: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        return not (self.failed or self.lost or self.duplicated or self.wrong)

    def largest_gap_s(self, first: float, last: float) -> float:
        """The longest time between two successive finished jobs of a span, its ends included."""
        inside = [moment for moment in self.finished_at if first <= moment <= last]
        return max(after - before for before, after in itertools.pairwise([first, *inside, last]))

    def num_done_by(self, pids: Collection[int]) -> int:
        """By workers whose names have one of these process ids."""
        wanted = set(map(str, pids))
        return sum(number for name, number in self.by_worker.items() if wanted & set(name.split(".")))

    def per_s(self, first: float, last: float) -> float:
        return sum(first <= moment <= last for moment in self.finished_at) / (last - first)


def await_ends(queue: EmbedQueue, ids: Sequence[str]) -> float:
    """Seconds until every job has ended."""
    open_ids = list(ids)

    def is_over() -> bool:
        nonlocal open_ids
        statuses = queue.statuses(open_ids[:CHUNK_JOBS])
        ended = {job_id for job_id, status in statuses.items() if status in ENDED or status is None}
        open_ids = [job_id for job_id in open_ids if job_id not in ended]
        return not open_ids

    return until(is_over, "jobs have not ended", lambda: f"{len(open_ids)} are open, such as {open_ids[:5]}")


def audit(queue: EmbedQueue, ids: Sequence[str], model: str) -> Account:
    """Of jobs that have ended."""
    account = Account(len(ids))
    encoder = NoopEncoder.parse(model)
    for chunk in _chunks(ids):
        for job_id, entries in zip(chunk, _entries(queue, chunk), strict=True):
            _count(account, job_id, entries)
        _compare(account, queue, chunk, encoder)
    account.finished_at.sort()
    return account


def finish_times(queue: EmbedQueue, ids: Sequence[str]) -> list[float]:
    """Seconds since 1970 at which each job that has a result got its last."""
    return [_moment(entries[-1]) for chunk in _chunks(ids) for entries in _entries(queue, chunk) if entries]


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), CHUNK_JOBS):
        yield ids[start : start + CHUNK_JOBS]


def _entries(queue: EmbedQueue, ids: Sequence[str]) -> list[Any]:
    with queue._redis.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.xrange(keys.results(job_id))
        return list(pipeline.execute())


def _moment(entry: Any) -> float:
    """A stream's ids are the server's milliseconds."""
    return int(entry[0].partition(b"-")[0]) / 1000


def _count(account: Account, job_id: str, entries: Sequence[Any]) -> None:
    if not entries:
        account.lost.append(job_id)
        return
    if len(entries) > 1:
        account.duplicated.append(job_id)
    account.finished_at.append(_moment(entries[-1]))
    account.by_worker[entries[-1][1][b"worker_name"].decode()] += 1


def _compare(account: Account, queue: EmbedQueue, ids: Sequence[str], encoder: NoopEncoder) -> None:
    for job_id, outcome in queue.results(ids, timeout=0).items():
        if job_id in account.lost:
            continue
        if isinstance(outcome, Exception):
            account.failed[job_id] = str(outcome)
            continue
        wanted = encoder.postprocess(encoder.encode_tokens(encoder.tokenize(texts_of(job_id))))
        if not np.array_equal(outcome.vectors, wanted):
            account.wrong.append(job_id)
