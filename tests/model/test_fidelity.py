"""Cosines and rank correlation, against hand-computed values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from embedq.model.fidelity import cosines, spearman, spearman_on_pairs
from embedq.model.samples import sentence_pairs


def test_cosines_do_not_depend_on_length() -> None:
    first = np.array([[1, 0], [3, 3], [0, 2]], dtype=np.float32)
    second = np.array([[5, 0], [0, 1], [0, -7]], dtype=np.float32)
    np.testing.assert_allclose(cosines(first, second), [1, math.sqrt(0.5), -1], atol=1e-6)


def test_spearman_by_hand() -> None:
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15)
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([20.0, 10.0, 40.0, 30.0])) == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys_with_ties_too(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 11, 200) / 2, random.normal(size=200).round(1)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


def test_spearman_of_a_constant_is_not_a_number() -> None:
    assert math.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_vectors_made_of_the_grades_correlate_with_them_and_random_ones_do_not() -> None:
    """An angle by the grade for each pair; unrelated pairs are made of others' sentences, which spoils theirs."""
    angles: dict[str, float] = {}
    for pair in sentence_pairs():
        angles.setdefault(pair.first, 0.0)
        angles.setdefault(pair.second, (5 - pair.grade) * math.pi / 12)

    def encode(texts: list[str]) -> np.ndarray:
        return np.array([[math.cos(angles[text]), math.sin(angles[text])] for text in texts], dtype=np.float32)

    assert spearman_on_pairs(encode) > 0.8
    assert abs(spearman_on_pairs(lambda texts: np.random.default_rng(0).normal(size=(len(texts), 8)))) < 0.2
