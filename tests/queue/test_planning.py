"""Planning is pure, so its promises are properties."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.model.device import MAX_SCORES
from embedq.model.packing import plan_groups
from embedq.model.samples import corpus
from embedq.worker.estimates import ClaimBudget, EncodeTime
from embedq.worker.planning import DUE_AFTER, PRIORITY_BATCHES, WINDOW_BATCHES, QueueTurns, ReadyJob, ReadyTexts

#: Tokens of each text of a job, kind, rank.
jobs = st.lists(
    st.tuples(st.lists(st.integers(1, 512), min_size=1, max_size=30), st.integers(0, 1), st.integers(0, 2)), max_size=40
)
Text = tuple[int, int]


def ready_job(job: int, lengths: Sequence[int], kind: int = 0, rank: int = 0) -> ReadyJob:
    return ReadyJob([(job, place) for place in range(len(lengths))], lengths, kind, rank)


def drained(ready: ReadyTexts) -> list[list[Text]]:
    batches = []
    while ready:
        batches.append(ready.take())
    return batches


@given(jobs, st.integers(1, 3000))
def test_every_text_is_in_exactly_one_micro_batch(found: list[tuple[list[int], int, int]], budget: int) -> None:
    ready = ReadyTexts(budget)
    ready.add([ready_job(job, *rest) for job, rest in enumerate(found)])
    wanted = [(job, place) for job, (lengths, _, _) in enumerate(found) for place in range(len(lengths))]
    assert ready.num_tokens == sum(sum(lengths) for lengths, _, _ in found)
    batches = drained(ready)
    assert sorted(text for batch in batches for text in batch) == wanted
    assert ready.num_tokens == 0


@given(jobs, st.integers(1, 3000))
def test_a_micro_batch_keeps_to_budget_and_kind_and_holds_jobs_together(
    found: list[tuple[list[int], int, int]], budget: int
) -> None:
    ready = ReadyTexts(budget)
    ready.add([ready_job(job, *rest) for job, rest in enumerate(found)])
    for batch in drained(ready):
        tokens = sum(found[job][0][place] for job, place in batch)
        assert tokens <= budget or len(batch) == 1
        assert len({found[job][1] for job, _ in batch}) == 1
        assert batch == sorted(batch)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80))
def test_short_jobs_of_one_queue_leave_in_the_order_of_their_arrival_where_length_does_not_matter(
    counts: list[int],
) -> None:
    """With one length there is nothing to gain by another order."""
    ready = ReadyTexts(max_batch_tokens=1000)
    ready.add([ready_job(job, [4] * min(count, 60)) for job, count in enumerate(counts)])
    order = [text for batch in drained(ready) for text in batch]
    assert order == sorted(order)


def _stream(seed: int, budget: int) -> tuple[int, dict[Text, int]]:
    """A worker's life: texts come as there is room, of odd lengths, ranks and kinds; the batches each was passed by."""
    chance = random.Random(seed)
    ready = ReadyTexts(budget)
    waiting: dict[Text, float] = {}
    passed: dict[Text, int] = {}
    job = 0
    for step in range(250):
        while step < 200 and ready.num_tokens < WINDOW_BATCHES * budget:
            size = chance.choice([1, 1, 1, 2, 5, chance.randint(1, 300)])
            lengths = [chance.choice([3, 4, 5, chance.randint(3, min(384, budget))]) for _ in range(size)]
            ready.add([ready_job(job, lengths, chance.choice([0, 0, 0, 1]), chance.choice([0, 0, 1]))])
            ready.first()  # gives them their keys
            waiting |= dict(zip(ready._items[-size:], ready._keys[-size:].tolist(), strict=True))
            job += 1
        if not ready:
            break
        batch = ready.take()
        latest = max(waiting.pop(text) for text in batch)
        for text, key in waiting.items():
            passed[text] = passed.get(text, 0) + (key < latest)
    return job, passed


@pytest.mark.parametrize("seed", range(12))
def test_a_text_is_passed_over_a_bounded_number_of_times(seed: int) -> None:
    num_jobs, passed = _stream(seed, budget=(400, 1000, 4000)[seed % 3])
    assert num_jobs > 20
    assert max(passed.values()) >= 1
    assert max(passed.values()) <= 2 * DUE_AFTER


def test_a_long_job_does_not_hold_up_short_ones() -> None:
    ready = ReadyTexts(max_batch_tokens=1000)
    ready.add([ready_job(0, [40] * 1024)])
    assert {job for job, _ in ready.take()} == {0}
    ready.add([ready_job(job, [40]) for job in range(1, 21)])
    first_two = ready.take() + ready.take()
    assert len({job for job, _ in first_two} - {0}) >= 20  # not the 41 micro-batches of the long one
    left = drained(ready)
    assert sum(len(batch) for batch in left) + len(first_two) == 1024 - 25 + 20


def test_of_a_long_job_one_micro_batch_counts_as_claimed_ahead() -> None:
    ready = ReadyTexts(max_batch_tokens=1000)
    ready.add([ready_job(0, [100] * 50), ready_job(1, [100] * 5)])
    assert (ready.num_tokens, ready.tokens_ahead) == (5500, 1500)
    drained(ready)
    assert ready.tokens_ahead == 0


def test_a_long_job_keeps_its_share_under_a_stream_of_short_ones() -> None:
    ready = ReadyTexts(max_batch_tokens=1000)
    ready.add([ready_job(0, [40] * 1000)])
    done = 0
    for step in range(1, 200):
        ready.add([ready_job(25 * step + n, [40]) for n in range(25)])
        done += sum(job == 0 for job, _ in ready.take())
    assert done == 1000


def test_urgent_queues_come_first_but_starve_nobody() -> None:
    ready = ReadyTexts(max_batch_tokens=100)
    ready.add([ready_job(0, [50], rank=1)])
    waited = 0
    for step in range(1, 100):
        ready.add([ready_job(step, [100], rank=0)])
        batch = ready.take()
        if (0, 0) in batch:
            break
        waited += 1
    assert waited > 8  # strict as far as a worker looks ahead
    assert waited <= PRIORITY_BATCHES * 4 + DUE_AFTER


def test_queues_take_turns_so_that_the_first_cannot_starve_the_others() -> None:
    turns = QueueTurns()
    orders = [turns.order(["a", "b", "c"]) for _ in range(64)]
    assert [order[0] for order in orders].count("a") == 60
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert QueueTurns().order(["only"]) == ["only"]


def test_attention_pads_little_on_mixed_texts() -> None:
    """The longest first, as the encoder sorts a micro-batch; of what comes in an arbitrary order."""
    texts = corpus("mixed", 2000, lambda some: [len(text) // 5 + 2 for text in some])
    lengths = [len(text) // 5 + 2 for text in texts]
    ready = ReadyTexts(max_batch_tokens=4096)
    padded = used = 0
    waiting = iter(enumerate(lengths))
    while True:
        while ready.num_tokens < WINDOW_BATCHES * 4096 and (job := next(waiting, None)) is not None:
            ready.add([ready_job(job[0], [job[1]])])
        if not ready:
            break
        batch = sorted((lengths[job] for job, _ in ready.take()), reverse=True)
        for group in plan_groups(batch, MAX_SCORES["cuda"]):
            padded += group.length * len(group.lengths)
            used += sum(group.lengths)
    assert used == sum(lengths)
    assert (padded - used) / padded < 0.10


@given(st.integers(1, 500), st.integers(1, 500))
def test_texts_that_nobody_wants_any_more_are_dropped(wanted: int, unwanted: int) -> None:
    ready = ReadyTexts(max_batch_tokens=1000)
    ready.add([ready_job(0, [3] * unwanted), ready_job(1, [5] * wanted)])
    ready.discard(lambda text: text[0] == 1)
    assert ready.num_tokens == 5 * wanted
    assert {job for batch in drained(ready) for job, _ in batch} == {1}


def test_the_claim_budget_learns_how_many_bytes_fill_a_micro_batch() -> None:
    budget = ClaimBudget(1000)
    assert budget.max_bytes == 4000
    for _ in range(50):
        budget.learn(num_bytes=500, num_tokens=50)
    assert 9900 < budget.max_bytes <= 10_000
    assert budget.tokens(1000) == pytest.approx(100, abs=2)
    budget.learn(0, 0)
    budget.learn(1, 10**9)
    assert 1 <= budget.max_bytes < 10_000


@settings(max_examples=50)
@given(st.floats(0, 0.1), st.floats(1e-6, 1e-2), st.lists(st.integers(1, 4096), min_size=2, max_size=60))
def test_the_time_of_a_micro_batch_is_learnt_as_a_line(start_s: float, per_token_s: float, sizes: list[int]) -> None:
    time = EncodeTime()
    for tokens in sizes:
        time.learn(tokens, start_s + per_token_s * tokens)
    if np.ptp(sizes[-40:]) > 100:
        assert time.seconds(1000) == pytest.approx(start_s + per_token_s * 1000, rel=0.05)
        assert time.tokens(start_s + per_token_s * 1000) == pytest.approx(1000, abs=60)
    assert all(math.isfinite(time.seconds(tokens)) and time.seconds(tokens) >= 0 for tokens in (0, 1, 10**6))


def test_a_time_that_was_not_learnt_yet_promises_nothing() -> None:
    time = EncodeTime()
    assert time.seconds(1000) == 0.0
    assert time.tokens(1.0) is None
    time.learn(100, 0.1)
    assert time.seconds(200) == pytest.approx(0.2)  # one size alone: through the origin


def test_jobs_of_more_than_a_micro_batch_are_counted_until_their_last_text_is_taken() -> None:
    ready = ReadyTexts(max_batch_tokens=1000)
    ready.add([ready_job(0, [100] * 25), ready_job(1, [100] * 10), ready_job(2, [100] * 30)])
    assert ready.num_long_jobs == 2
    ready.take()
    assert ready.num_long_jobs == 2
    drained(ready)
    assert ready.num_long_jobs == 0
