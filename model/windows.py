"""How a text that is longer than the model is cut into windows of tokens. Pure: numbers in, numbers out.

All windows are full and evenly spread: a short rest at the end would have the say of a whole window in their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedq.model.encoder import MAX_WINDOWS
from embedq.model.errors import ModelOptionError, TextTooLongError

#: The share of a window that overlaps the next, where nobody says another.
DEFAULT_OVERLAP_SHARE = 1 / 8


def checked_overlap(overlap: int | None, room: int) -> int:
    """`overlap`, or the default, for windows of `room` tokens beside the special ones and the prompt's.

    Raises ModelOptionError for one that leaves nothing to move on by.
    """
    if room < 1:
        raise ModelOptionError("the prompt leaves no room for a token of the text: shorten it")
    if overlap is None:
        return int(room * DEFAULT_OVERLAP_SHARE)
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap < room:
        raise ModelOptionError(f"chunk_overlap must be 0 to {room - 1} tokens with this prompt, not {overlap!r}")
    return overlap


def window_starts(num_tokens: int, room: int, overlap: int) -> list[int]:
    """Where each window of `room` tokens begins; neighbours share at least `overlap`. As few as can be."""
    gaps = -(-max(0, num_tokens - room) // (room - overlap))
    return [place * (num_tokens - room) // gaps for place in range(gaps + 1)] if gaps else [0]


def check_num_tokens(num_tokens: int, index: int, room: int, overlap: int) -> None:
    """Raises TextTooLongError for text `index` if it takes more than MAX_WINDOWS."""
    most = room + (MAX_WINDOWS - 1) * (room - overlap)
    if num_tokens > most:
        message = f"text {index} has more than the {most:,} tokens that {MAX_WINDOWS:,} windows hold: split it"
        raise TextTooLongError(message, index)


def mean_of_windows(vectors: NDArray[np.float32], num_windows: Sequence[int]) -> NDArray[np.float32]:
    """(n, d) float32 from the vectors of each text's windows, text after text, one window at least."""
    if len(vectors) == len(num_windows):
        return vectors
    counts = np.array(num_windows)
    sums = np.add.reduceat(vectors, np.cumsum(counts) - counts, axis=0)
    return np.asarray(sums / counts[:, None], dtype=np.float32)
