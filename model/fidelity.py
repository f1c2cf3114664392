"""How near vectors are to a reference, and how well their similarities agree with people's. numpy only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from embedq.model.precision import normalize_rows
from embedq.model.samples import sentence_pairs

#: Least cosine to float32 that quantized weights should leave to every text.
MIN_COSINE = 0.99

Floats = NDArray[np.float32]


def cosines(vectors: Floats, reference: Floats) -> Floats:
    """(n,) cosine of each row of two (n, d) arrays."""
    products: Floats = np.einsum("nd,nd->n", normalize_rows(vectors), normalize_rows(reference))
    return products


def spearman(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Spearman's rank correlation of two (n,) arrays; equal values share the mean of their ranks.

    NaN if one of them has only one value: then there is no order to agree with.
    """
    ranks = np.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    scale = float(np.sqrt(np.prod(np.square(centred).sum(axis=1))))
    return float(centred[0] @ centred[1]) / scale if scale else float("nan")


def spearman_on_pairs(encode: Callable[[list[str]], Floats]) -> float:
    """Of the cosines of the shipped sentence pairs with their grades; `encode` gives (n, d) for n texts."""
    pairs = sentence_pairs()
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    row = {text: index for index, text in enumerate(texts)}
    vectors = encode(texts)
    first = vectors[[row[pair.first] for pair in pairs]]
    second = vectors[[row[pair.second] for pair in pairs]]
    return spearman(cosines(first, second), np.array([pair.grade for pair in pairs]))


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[places], dtype=np.float64)
