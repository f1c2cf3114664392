"""Who takes part in the queue's benchmark: how many jobs each gets, and how the server is asked how far it is.

Knows the peers' key names; how each is set up is in queue_peers/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from embedq.producer import keys

#: Where those whose results are keys of no common name keep them.
RESULTS_DATABASE = 1


@dataclass(frozen=True, slots=True)
class Progress:
    #: every job is waiting still
    is_untouched: bool
    #: jobs whose result is stored
    num_done: int


@dataclass(frozen=True, slots=True)
class Look:
    """Commands that are answered by numbers, each with its database, and what their answers mean."""

    commands: tuple[tuple[int, tuple[str, ...]], ...]
    #: from the answers and the number of jobs
    read: Callable[[list[int], int], Progress]


def _counts(waiting: tuple[str, ...], done: tuple[str, ...], done_database: int = 0) -> Look:
    """One command counts the jobs that wait, one those that are done."""

    def read(answers: list[int], num_jobs: int) -> Progress:
        return Progress(answers[0] == num_jobs, answers[1])

    return Look(((0, waiting), (done_database, done)), read)


def _rq(queue: str) -> Look:
    return _counts(("LLEN", keys.queue(queue)), ("ZCARD", keys.finished(queue)))


def _listed(queue_key: str) -> Look:
    """A list of jobs in one database, a key a result in the other."""
    return _counts(("LLEN", queue_key), ("DBSIZE",), RESULTS_DATABASE)


def _arq() -> Look:
    """A job stays queued until it is done, and has one key; while it runs, two. One tells the worker's health."""

    def read(answers: list[int], num_jobs: int) -> Progress:
        num_queued, num_keys, health = answers
        return Progress(num_keys - health == num_jobs + 1, num_jobs - num_queued)

    return Look(((0, ("ZCARD", "arq:queue")), (0, ("DBSIZE",)), (0, ("EXISTS", "arq:queue:health-check"))), read)


@dataclass(frozen=True, slots=True)
class Contender:
    #: a name of queue_peers/process.py's SYSTEMS
    system: str
    name: str
    look: Look
    #: jobs of a drain of about a second, by texts a job
    num_jobs: Mapping[int, int]
    #: the same with a slow network, one text a job
    num_distant_jobs: int
    #: in this project's environment, not the peers'
    is_ours: bool = False
    #: stopped in order, since it tells where its time went
    has_last_words: bool = False
    #: runs in each round; the others only in some
    is_main: bool = False


CONTENDERS = (
    Contender(
        *("embedq", "embedq worker", _rq("embed")),
        {1: 8000, 8: 4000, 64: 1000},
        8000,
        is_ours=True,
        has_last_words=True,
        is_main=True,
    ),
    Contender(
        *("rq-simple", "rq SimpleWorker", _rq("bench")), {1: 300, 8: 250, 64: 200}, 40, is_ours=True, is_main=True
    ),
    Contender(*("rq-forking", "rq Worker", _rq("bench")), {1: 30, 8: 30, 64: 30}, 15, is_ours=True),
    Contender(
        "huey",
        "huey",
        _counts(("LLEN", "huey.redis.bench"), ("HLEN", "huey.results.bench")),
        {1: 2000, 8: 1500, 64: 500},
        200,
    ),
    Contender("dramatiq", "dramatiq", _listed("dramatiq:default"), {1: 1500, 8: 1000, 64: 400}, 200),
    Contender("arq", "arq", _arq(), {1: 1000, 8: 800, 64: 400}, 400),
    Contender("celery", "celery", _listed("celery"), {1: 500, 8: 400, 64: 250}, 100),
    Contender("celery-batches", "celery-batches", _listed("celery"), {1: 500, 8: 400, 64: 250}, 100),
)
