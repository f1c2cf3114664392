"""Planning is pure, so its promises are properties."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from embedq.worker.planning import ClaimBudget, plan

lengths = st.lists(st.integers(1, 512), max_size=200)


@given(lengths, st.integers(1, 5000))
def test_every_text_is_in_exactly_one_micro_batch(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(lengths, st.integers(1, 5000))
def test_no_micro_batch_is_over_the_budget_unless_it_is_one_text(lengths: list[int], budget: int) -> None:
    for batch in plan(lengths, budget):
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget


@given(lengths, st.integers(1, 5000))
def test_texts_of_like_length_are_together_and_the_most_urgent_batch_is_first(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, budget)
    for batch in batches:
        assert [lengths[index] for index in batch] == sorted(lengths[index] for index in batch)
    assert [min(batch) for batch in batches] == sorted(min(batch) for batch in batches)
    spans = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in batches)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


def test_the_claim_budget_learns_how_many_bytes_fill_a_micro_batch() -> None:
    budget = ClaimBudget(1000)
    assert budget.max_bytes == 4000
    for _ in range(50):
        budget.learn(num_bytes=500, num_tokens=50)
    assert 9900 < budget.max_bytes <= 10_000
    budget.learn(0, 0)
    budget.learn(1, 10**9)
    assert 1 <= budget.max_bytes < 10_000
