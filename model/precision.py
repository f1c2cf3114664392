"""From raw vectors to what the caller asked for: cut, normalise, quantize. numpy only.

Knows no model and no device; every encoder shares it.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from embedq.model.encoder import Precision
from embedq.model.errors import ModelOptionError

#: Lower bound of the divisor, as in torch.nn.functional.normalize: a zero vector stays zero, never NaN.
NORM_EPSILON = 1e-12

_NEEDS_CALIBRATION = ("int8", "uint8")
_SUPPORTED = ("float32", "float16", "binary", "ubinary")


def postprocess(
    vectors: NDArray[np.float32],
    *,
    normalize: bool,
    dimensions: int | None = None,
    precision: Precision = "float32",
) -> NDArray[np.generic]:
    """(n, d) in `precision` from (n, embedding_dim) float32; the input is left as it is."""
    if dimensions is not None:
        vectors = _cut(vectors, dimensions)
    if normalize:
        vectors = normalize_rows(vectors)
    return quantize(vectors, precision)


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


def quantize(vectors: NDArray[np.float32], precision: Precision) -> NDArray[np.generic]:
    """As `quantize_embeddings` of sentence-transformers.

    float32, float16: (n, d). ubinary: (n, ceil(d / 8)) uint8, one bit a dimension, set where positive, the
    highest bit first. binary: the same minus 128, as int8.
    """
    if precision == "float32":
        # A view of a wider array would keep all of it alive, and a single row of it passes for contiguous.
        return vectors.copy()
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=1)
    if precision == "binary":
        # Flipping the highest bit of a byte is subtracting 128 from it, without a wider type.
        return (np.packbits(vectors > 0, axis=1) ^ np.uint8(0x80)).view(np.int8)
    if precision in _NEEDS_CALIBRATION:
        raise ModelOptionError(
            f"precision {precision!r} needs calibration ranges, which this version does not have: "
            f"use one of {', '.join(_SUPPORTED)}"
        )
    raise ModelOptionError(f"unknown precision {precision!r}: use one of {', '.join(_SUPPORTED)}")
