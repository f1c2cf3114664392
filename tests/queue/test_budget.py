"""The budget after memory ran out: less at once, never nothing, and by and by whole again."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.worker.budget import MAX_PATIENCE, PATIENCE, MemoryBudget

#: (tokens, whether memory ran out for them)
Attempts = list[tuple[int, bool]]
attempts = st.lists(st.tuples(st.integers(1, 40_000), st.booleans()), max_size=60)


def used(full: int, history: Attempts) -> MemoryBudget:
    budget = MemoryBudget(full)
    for num_tokens, ran_out in history:
        (budget.shrink if ran_out else budget.succeeded)(num_tokens)
    return budget


@settings(deadline=None)
@given(st.integers(1, 20_000), attempts)
def test_the_limit_lies_between_one_token_and_all(full: int, history: Attempts) -> None:
    budget = MemoryBudget(full)
    for num_tokens, ran_out in history:
        before = budget.limit
        if ran_out:
            budget.shrink(num_tokens)
            assert budget.limit <= max(1, before // 2)
            assert budget.limit <= max(1, num_tokens // 2)
        else:
            budget.succeeded(num_tokens)
            assert before <= budget.limit <= 2 * before
        assert 1 <= budget.limit <= full
        assert budget.is_whole == (budget.limit == full)


@settings(deadline=None)
@given(st.integers(1, 20_000), attempts)
def test_it_is_whole_again_whatever_happened_once_enough_went_well(full: int, history: Attempts) -> None:
    budget = used(full, history)
    for _ in range(MAX_PATIENCE * (full.bit_length() + 1)):
        budget.succeeded(budget.limit)
    assert budget.is_whole


@settings(deadline=None)
@given(st.integers(1, 20_000), st.lists(st.integers(2, 40_000), max_size=20), st.integers(0, 15))
def test_what_one_text_alone_was_guilty_of_costs_the_others_nothing(full: int, lacks: list[int], rises: int) -> None:
    """Nor does it make up for a lack from before: what had risen again by then is what is left."""
    budget = MemoryBudget(full)
    budget.shrink(full)
    before = budget.limit
    for _ in range(PATIENCE * rises):
        budget.succeeded(budget.limit)
    assert budget.limit == min(full, before << rises)
    before = budget.limit if rises else full
    for num_tokens in lacks:
        budget.shrink(num_tokens)
    budget.forgive()
    assert budget.limit == before
    budget.forgive()
    assert budget.limit == before


def test_it_doubles_once_so_many_limits_worth_of_tokens_went_well() -> None:
    budget = MemoryBudget(1000)
    budget.shrink(1000)
    assert budget.limit == 500
    for _ in range(2 * PATIENCE - 1):
        budget.succeeded(250)
        assert budget.limit == 500
    budget.succeeded(250)
    assert budget.is_whole


def test_a_lack_that_lasts_is_tried_ever_more_rarely() -> None:
    """As many tokens fit as half of it: each rise fails, and costs one attempt."""
    budget = MemoryBudget(1000)
    between: list[int] = []
    for _ in range(9):
        budget.shrink(1000)
        between.append(0)
        while not budget.is_whole:
            budget.succeeded(500)
            between[-1] += 1
    assert between == [min(PATIENCE * 2**step, MAX_PATIENCE) for step in range(9)]


def test_after_a_time_that_went_well_it_is_patient_no_longer_than_at_first() -> None:
    budget = MemoryBudget(1000)
    for _ in range(3):
        budget.shrink(1000)
        while not budget.is_whole:
            budget.succeeded(500)
    for _ in range(4 * PATIENCE):
        budget.succeeded(1000)
    budget.shrink(1000)
    for _ in range(PATIENCE):
        budget.succeeded(500)
    assert budget.is_whole
