"""Packing and grouping: nothing lost, nothing doubled, bounds kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mpnet.modeling_mpnet import create_position_ids_from_input_ids

from embedq.model.packing import Group, pack, plan_groups

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda lengths: sorted(lengths, reverse=True))


@given(LENGTHS, st.integers(1, 20_000))
def test_groups_cover_all_texts_once_within_the_bound(lengths: list[int], max_scores: int) -> None:
    groups = list(plan_groups(lengths, max_scores))
    assert [length for group in groups for length in group.lengths] == lengths
    assert groups[0].start == 0
    assert all(group.end - group.start == sum(group.lengths) for group in groups)
    assert all(before.end == after.start for before, after in pairwise(groups))
    for group in groups:
        assert len(group.lengths) == 1 or len(group.lengths) * group.length**2 <= max_scores


@given(LENGTHS, st.integers(1, 4))
def test_gather_then_scatter_gives_every_value_back(lengths: list[int], num_heads: int) -> None:
    total = sum(lengths)
    qkv = np.arange(total * 3 * num_heads).reshape(total, 3, num_heads)
    for group in plan_groups(lengths, 5_000):
        shape = (3, len(group.lengths), num_heads, group.length)
        heads = qkv.reshape(-1)[group.gather_rows(num_heads)].reshape(shape)
        for part in range(3):
            tokens = heads[part].reshape(-1)[group.scatter_rows(num_heads)].reshape(-1, num_heads)
            assert np.array_equal(tokens, qkv[group.start : group.end, part])


def test_padded_places_repeat_the_last_token_and_are_marked() -> None:
    group = Group(start=10, end=15, lengths=(3, 2))
    assert group.is_ragged
    assert group.is_token().tolist() == [[True, True, True], [True, True, False]]
    assert group.gather_rows(1).reshape(3, 6)[0].tolist() == [30, 33, 36, 39, 42, 42]


@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, max_size=9), min_size=1, max_size=6))
def test_positions_are_transformers_even_where_padding_tokens_stand_in_the_text(texts: list[list[int]]) -> None:
    packed = pack([np.array(ids, dtype=np.int32) for ids in sorted(texts, key=len, reverse=True)])
    by_text = np.split(packed.positions, np.cumsum(packed.lengths)[:-1])
    ids_by_text = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
    for ids, positions in zip(ids_by_text, by_text, strict=True):
        assert positions.tolist() == create_position_ids_from_input_ids(torch.tensor(ids)[None], 1)[0].tolist()


@pytest.mark.parametrize(("lengths", "num_groups"), [([8] * 5, 1), ([64, 8], 2), ([5, 4, 3, 2, 1], 1)])
def test_like_lengths_share_a_group(lengths: list[int], num_groups: int) -> None:
    assert len(list(plan_groups(lengths, 10**9))) == num_groups
