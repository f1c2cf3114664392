"""The drills in small: what they find in minutes is looked for by hand, that they would find it is seen here."""

from __future__ import annotations

import dataclasses

import pytest

from tests.chaos import poison_drill, soak
from tests.chaos.fleet import Footprint
from tests.chaos.poison_worker import HARMS


def be_silent(line: str) -> None:
    """Nobody reads along."""


@pytest.mark.slow
@pytest.mark.chaos
def test_exactly_the_poison_jobs_fail_and_each_names_its_text() -> None:
    found = poison_drill.run(num_good=400, num_poison=len(HARMS), num_workers=2, say=be_silent)
    assert found.wrong == []
    assert set(found.exits) == {-6, 8}  # aborted, and left by the watchdog
    assert "| poison jobs " in poison_drill.report(found)


def test_every_kind_of_poison_comes_alone_and_among_innocent_texts() -> None:
    jobs = poison_drill.poison_jobs(100)
    assert {(job.kind, len(job.texts) > 1) for job in jobs} == {(kind, large) for kind in HARMS for large in (0, 1)}
    assert all(job.texts[job.text_index].startswith(f"poison-{job.kind} ") for job in jobs)
    assert sum(text.startswith("poison-") for job in jobs for text in job.texts) == 100


@pytest.mark.slow
@pytest.mark.chaos
def test_a_worker_leaves_nothing_behind() -> None:
    found = soak.run(num_jobs=3000, warm_up_jobs=3000, say=be_silent)
    assert found.before.keys == found.after.keys
    assert 0 <= found.after.worker.num_fds - found.before.worker.num_fds <= soak.MAX_MORE_CONNECTIONS
    assert found.before.worker.num_threads == found.after.worker.num_threads
    assert "| worker's resident memory " in soak.report(found)


def test_what_a_soak_leaves_is_told() -> None:
    rest = soak.AtRest(Footprint(rss_bytes=100, num_fds=10, num_threads=5), redis_bytes=100, keys=frozenset("ab"))
    clean = soak.Findings(1, 1.0, rest, rest, 0, "7.0")
    assert clean.leaks == []
    grown = soak.AtRest(Footprint(rss_bytes=106, num_fds=20, num_threads=6), redis_bytes=120, keys=frozenset("bc"))
    leaks = dataclasses.replace(clean, after=grown).leaks
    assert [leak.split(" grew")[0] for leak in leaks] == [
        "the worker's memory",
        "Redis' memory",
        "keys that came or went: a, c",
        "the worker's threads are not as many as before",
        "the worker opened 10 files that it left open",
    ]
