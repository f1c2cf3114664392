"""Many texts a slice at a time, and the slices' rows as one array. numpy only; knows no model.

A slice bounds what is held beyond the result, and is large enough for texts of like length to find each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

SLICE_TEXTS = 8192
#: Characters of one slice: at worst as many tokens.
SLICE_CHARS = 1 << 23


def slices_of(texts: Sequence[str], max_chars: int | None) -> Iterator[tuple[int, Sequence[str]]]:
    """Consecutive slices within SLICE_TEXTS and SLICE_CHARS, each with its start; one empty for no texts.

    Of one text at most `max_chars` count, where the rest is cut off anyway.
    """
    start = chars = 0
    for end, text in enumerate(texts):
        # What is no text is the tokenizer's to refuse.
        count = len(text) if isinstance(text, str) else 0
        count = count if max_chars is None else min(count, max_chars)
        if end > start and (end - start == SLICE_TEXTS or chars + count > SLICE_CHARS):
            yield start, texts[start:end]
            start, chars = end, 0
        chars += count
    yield start, texts[start:]


def stack(parts: Iterator[NDArray[np.generic]], num_rows: int) -> NDArray[np.generic]:
    """The rows of all parts, of which there is at least one, written in place: no part outlives the next."""
    part = next(parts)
    if len(part) == num_rows:
        return part
    rows = np.empty((num_rows, part.shape[1]), part.dtype)
    rows[: len(part)] = part
    filled = len(part)
    for part in parts:
        rows[filled : filled + len(part)] = part
        filled += len(part)
    return rows
