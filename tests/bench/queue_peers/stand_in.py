"""What every system's job computes: a vector of 768 float32 a text, for the price of copying it."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

DIM = 768
NUM_VECTORS = 256

_table = np.random.default_rng(0).standard_normal((NUM_VECTORS, DIM), dtype=np.float32)


def embed(texts: Sequence[str]) -> bytes:
    """len(texts) x 768 float32, row after row: 3,072 bytes a text."""
    return _table[[crc32(text.encode()) % NUM_VECTORS for text in texts]].tobytes()
