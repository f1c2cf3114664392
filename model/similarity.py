"""How alike two vectors are: sentence-transformers' four functions, by its names. numpy only.

Knows no model; which function a model wants is said where its folder is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedq.model.errors import ModelOptionError
from embedq.model.precision import normalize_rows

#: What sentence-transformers takes where a folder names none of its functions.
DEFAULT_SIMILARITY: Final = "cosine"
#: Differences (rows of a, rows of b, d) that exist at once, in numbers.
BLOCK_ELEMENTS: Final = 1 << 22

Matrix = NDArray[np.float32]


def similarity(a: ArrayLike, b: ArrayLike, name: str = DEFAULT_SIMILARITY) -> Matrix:
    """(n, m) float32: the higher, the more alike; distances are negative.

    a: (n, d) or (d,), b: (m, d) or (d,). Raises ModelOptionError for an unknown name or shapes that don't fit.
    """
    if name not in SIMILARITY_FUNCTIONS:
        raise ModelOptionError(f"unknown similarity {name!r}: use one of {', '.join(SIMILARITY_FUNCTIONS)}")
    first, second = _rows(a), _rows(b)
    if first.shape[1] != second.shape[1]:
        raise ModelOptionError(f"vectors of {first.shape[1]} and of {second.shape[1]} dimensions cannot be compared")
    return SIMILARITY_FUNCTIONS[name](first, second)


def _rows(vectors: ArrayLike) -> Matrix:
    try:
        rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    except (TypeError, ValueError) as err:
        raise ModelOptionError(f"vectors must be numbers, as many in each: {err}") from err
    if rows.ndim != 2:
        raise ModelOptionError(f"vectors must be (n, d) or (d,), not of {rows.ndim} dimensions")
    return rows


def _dot(a: Matrix, b: Matrix) -> Matrix:
    return np.asarray(a @ b.T, dtype=np.float32)


def _cosine(a: Matrix, b: Matrix) -> Matrix:
    return _dot(normalize_rows(a), normalize_rows(b))


def _euclidean(a: Matrix, b: Matrix) -> Matrix:
    # |a - b|² = |a|² - 2ab + |b|²: in float64, for close vectors lose all digits of float32 there.
    first, second = a.astype(np.float64), b.astype(np.float64)
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * (first @ second.T)
    return np.asarray(-np.sqrt(np.maximum(squares, 0)), dtype=np.float32)


def _manhattan(a: Matrix, b: Matrix) -> Matrix:
    distances = np.empty((len(a), len(b)), np.float32)
    step = max(1, BLOCK_ELEMENTS // max(1, b.size))
    for start in range(0, len(a), step):
        distances[start : start + step] = np.abs(a[start : start + step, None] - b).sum(axis=2)
    return -distances


#: By sentence-transformers' names.
SIMILARITY_FUNCTIONS: Final[dict[str, Callable[[Matrix, Matrix], Matrix]]] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}
