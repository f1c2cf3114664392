"""From raw vectors to what the caller asked for: cut, normalise, quantize; and back from bytes. numpy only.

Knows no model and no device; every encoder shares it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedq.model.encoder import CALIBRATED, TOKEN_PRECISIONS, Precision
from embedq.model.errors import ModelOptionError

#: Lower bound of the divisor, as in torch.nn.functional.normalize: a zero vector stays zero, never NaN.
NORM_EPSILON = 1e-12
#: Steps between the ends of a dimension's range: the 256 numbers of a byte.
STEPS = 255

#: (2, d) the lowest value of each dimension and the highest
Ranges = NDArray[np.float32]


def postprocess(
    vectors: NDArray[np.float32],
    *,
    normalize: bool,
    dimensions: int | None = None,
    precision: Precision = "float32",
    find_ranges: Callable[[int], Ranges] | None = None,
) -> NDArray[np.generic]:
    """(n, d) in `precision` from (n, embedding_dim) float32; the input is left as it is, and given back if that is all.

    find_ranges: asked for the ranges of the d dimensions that int8 and uint8 are steps of, and for no others.
    """
    if dimensions is not None:
        vectors = _cut(vectors, dimensions)
    if normalize:
        vectors = normalize_rows(vectors)
    if precision == "float32" and (normalize or dimensions is None):
        return vectors
    ranges = find_ranges(vectors.shape[1]) if find_ranges and precision in CALIBRATED else None
    return quantize(vectors, precision, ranges)


def postprocess_states(
    states: NDArray[np.float32], *, normalize: bool | None, dimensions: int | None, precision: Precision
) -> NDArray[np.generic]:
    """The same for tokens' vectors (T, token_dim): unit length only if asked, float32 or float16 only."""
    if precision not in TOKEN_PRECISIONS:
        raise ModelOptionError(f"token output has precision {' or '.join(TOKEN_PRECISIONS)}, not {precision!r}")
    return postprocess(states, normalize=normalize is True, dimensions=dimensions, precision=precision)


def _cut(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    embedding_dim = vectors.shape[1]
    if isinstance(dimensions, bool) or not isinstance(dimensions, int):
        raise ModelOptionError(f"dimensions must be a whole number, not {dimensions!r}")
    if not 1 <= dimensions <= embedding_dim:
        raise ModelOptionError(f"dimensions must be 1 to {embedding_dim} for this model, not {dimensions}")
    return vectors[:, :dimensions]


def normalize_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    # A python float keeps float32 arrays float32.
    return cast("NDArray[np.float32]", vectors / np.maximum(norms, NORM_EPSILON)[:, None])


def quantize(vectors: NDArray[np.float32], precision: Precision, ranges: Ranges | None = None) -> NDArray[np.generic]:
    """As `quantize_embeddings` of sentence-transformers.

    float32, float16: (n, d). uint8: (n, d) steps of `ranges`, clamped to their ends. int8: the same minus 128.
    ubinary: (n, ceil(d / 8)) uint8, one bit a dimension, set where positive, the highest bit first. binary: the
    same minus 128, as int8.
    """
    if precision == "float32":
        # A view of a wider array would keep all of it alive, and a single row of it passes for contiguous.
        return vectors.copy()
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=1)
    if precision == "binary":
        return _minus_128(np.packbits(vectors > 0, axis=1))
    if precision in CALIBRATED:
        if ranges is None:
            raise ModelOptionError(f"precision {precision!r} needs calibration ranges")
        steps = quantize_bytes(vectors, ranges)
        return _minus_128(steps) if precision == "int8" else steps
    raise ModelOptionError(f"unknown precision {precision!r}: use one of {', '.join(get_args(Precision))}")


def _minus_128(values: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Flipping the highest bit of a byte is subtracting 128 from it, without a wider type."""
    return (values ^ np.uint8(0x80)).view(np.int8)


def ranges_fault(ranges: NDArray[np.generic]) -> str | None:
    """Why these are no ranges; None if they are."""
    if ranges.ndim != 2 or ranges.shape[0] != 2 or ranges.shape[1] == 0:
        return f"must have the shape (2, dimensions), not {ranges.shape}"
    if ranges.dtype.kind != "f" or not np.isfinite(ranges).all():
        return "must be finite floating-point numbers"
    if (ranges[0] > ranges[1]).any():
        return "must hold the lowest values in the first row and the highest in the second"
    return None


def check_ranges(ranges: ArrayLike, dimensions: int) -> Ranges:
    """A caller's own ranges as (2, dimensions) float32. Raises ModelOptionError."""
    try:
        checked = np.asarray(ranges, dtype=np.float32)
    except (TypeError, ValueError) as err:
        raise ModelOptionError(f"ranges must be numbers, as many in both rows: {err}") from err
    if reason := ranges_fault(checked):
        raise ModelOptionError(f"ranges {reason}")
    if checked.shape[1] != dimensions:
        raise ModelOptionError(f"ranges are for {checked.shape[1]} dimensions, the vectors have {dimensions}")
    return checked


def quantize_bytes(vectors: NDArray[np.float32], ranges: Ranges) -> NDArray[np.uint8]:
    """(n, d) uint8: the step of its range that each number lies in, rounded down.

    As sentence-transformers' `quantize_embeddings` in float32. What lies outside its range becomes the nearest end.
    """
    steps = np.floor((vectors - ranges[0]) / _step(ranges))
    return np.asarray(np.clip(steps, 0, STEPS), dtype=np.uint8)


def dequantize(vectors: NDArray[np.generic], ranges: ArrayLike) -> NDArray[np.float32]:
    """(n, d) float32 from int8 or uint8 vectors and the (2, d) ranges that they were made with.

    Each number is the middle of its step: off by half a step at most, unless it had to be clamped.
    Raises ModelOptionError for vectors of another type and ranges of another shape.
    """
    if vectors.dtype not in (np.int8, np.uint8):
        raise ModelOptionError(f"only int8 and uint8 vectors have ranges, not {vectors.dtype}")
    checked = check_ranges(ranges, vectors.shape[-1])
    steps = vectors.astype(np.float32) + (128 if vectors.dtype == np.int8 else 0)
    # The last step begins at the range's end, and a range of one value has no steps: so the end is the limit.
    middles = checked[0] + (steps + np.float32(0.5)) * _step(checked)
    return np.asarray(np.minimum(middles, checked[1]), dtype=np.float32)


def _step(ranges: Ranges) -> NDArray[np.float32]:
    """(d,) with 1 where all values were the same, as in sentence-transformers."""
    step = (ranges[1] - ranges[0]) / STEPS
    return np.where(step == 0, np.float32(1), step)
