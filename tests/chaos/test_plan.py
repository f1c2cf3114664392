"""The plan of a chaos run and its jobs: pure data, fixed by the seed."""

from __future__ import annotations

import itertools

import pytest

from tests.chaos.actions import actions
from tests.chaos.draws import (
    DEADLY,
    ENOUGH_RETRIES,
    POISON_MARK,
    POISON_PER_MILLE,
    _draw_alone,
    draw_job,
    job_id,
    parse_id,
)
from tests.chaos.plan import RATES, plan

SEEDS = (0, 7, 123_456)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_one_plan(seed: int) -> None:
    assert plan(seed, 300) == plan(seed, 300)
    assert plan(seed, 300) != plan(seed + 1, 300)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_every_producer_the_same_actions(seed: int) -> None:
    for producer in plan(seed, 60).producers:
        first = list(itertools.islice(actions(seed, producer), 500))
        _draw_alone.cache_clear()
        assert list(itertools.islice(actions(seed, producer), 500)) == first
        assert [action.at_s for action in first] == sorted(action.at_s for action in first)
        assert len({action.key for action in first}) == len(first)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_kind_of_fault_comes_in_a_short_run_and_none_after_its_end(seed: int) -> None:
    faults = plan(seed, 30).faults
    assert {fault.kind for fault in faults} == set(RATES)
    assert all(0 < fault.at_s < 30 for fault in faults)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_an_hour_has_the_kills_and_the_jobs_that_are_promised(seed: int) -> None:
    planned = plan(seed, 1800)
    kinds = [fault.kind for fault in planned.faults]
    assert kinds.count("kill_worker") >= 90
    assert kinds.count("kill_redis") >= 12
    assert 1800 * sum(producer.per_s for producer in planned.producers) >= 130_000


def test_a_job_is_its_id_and_the_seed() -> None:
    job = draw_job(7, "sync0", 41)
    assert parse_id(job.id) == ("sync0", 41)
    assert job.id == job_id("sync0", 41)
    _draw_alone.cache_clear()
    assert draw_job(7, "sync0", 41) == job
    assert draw_job(8, "sync0", 41).texts != job.texts


def test_every_kind_of_poison_is_among_the_first_jobs_of_one_producer() -> None:
    jobs = [draw_job(7, "sync0", number) for number in range(20 * len(POISON_PER_MILLE))]
    assert {job.poison for job in jobs if job.poison} == set(POISON_PER_MILLE)


def test_jobs_have_1_to_64_texts_that_nobody_else_has_and_poison_stands_where_they_say() -> None:
    jobs = [draw_job(7, "sync1", number) for number in range(5000)]
    sizes = {len(job.texts) for job in jobs}
    texts = [text for job in jobs for text in job.texts]
    assert min(sizes) == 1
    assert max(sizes) == 64
    assert len(set(texts)) == len(texts)
    for job in jobs:
        marked = [place for place, text in enumerate(job.texts) if text.startswith(POISON_MARK)]
        assert marked == ([] if job.poison_index is None else [job.poison_index])


def test_what_ends_processes_has_few_retries_and_is_neither_doubled_nor_canceled() -> None:
    jobs = [draw_job(seed, "sync0", number) for seed in range(20) for number in range(200)]
    deadly = [job for job in jobs if job.poison in DEADLY]
    assert deadly
    for job in deadly:
        assert job.retries <= 2
        assert (job.canceled_after_s, job.doubled_after_s, job.rivaled_after_s) == (None, None, None)


def test_jobs_of_one_call_share_their_settings_and_none_ends_processes() -> None:
    jobs = [draw_job(7, "bulk0", number, one_text=True) for number in range(3000)]
    assert {len(job.texts) for job in jobs} == {1}
    assert {job.retries for job in jobs} == {ENOUGH_RETRIES}
    assert not DEADLY & {job.poison for job in jobs}


def test_jobs_wait_only_for_earlier_ones_that_are_sure_to_finish() -> None:
    jobs = {job.id: job for job in (draw_job(7, "sync1", number) for number in range(3000))}
    waiting = [job for job in jobs.values() if job.depends_on]
    assert waiting
    for job in waiting:
        parent = jobs[job.depends_on]
        assert parse_id(parent.id)[1] < parse_id(job.id)[1]
        assert parent.is_innocent
        assert parent.retries == ENOUGH_RETRIES
        assert parent.canceled_after_s is None
