"""Many texts in one tensor without padding, and the groups in which attention sees them.

Knows lengths and positions; no weights and no device. The order is the point: the longest text first, so that
texts of like length are neighbours and a group is a slice of the packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedq.model.config import PADDING_ID

#: A text joins a group if padding it adds no more than this share of its row...
MAX_PADDING_SHARE = 1 / 8
#: ...or no more than this many tokens: below, a further group costs more than the padding.
MAX_PADDING_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Packed:
    """Texts one after the other, the longest first."""

    #: (T,) int32
    ids: NDArray[np.int32]
    #: (T,) int32, rows of the position table
    positions: NDArray[np.int32]
    #: tokens of each text, never rising
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbours in a `Packed` whose attention is computed together, as (num_texts, length, length)."""

    #: tokens [start, end) of the packed tensor
    start: int
    end: int
    #: of each text; the first is the longest
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.lengths[0]

    @property
    def is_ragged(self) -> bool:
        return self.lengths[-1] != self.length

    @property
    def num_cells(self) -> int:
        """Of the attention, padding included."""
        return len(self.lengths) * self.length * self.length

    def is_token(self) -> NDArray[np.bool_]:
        """(num_texts, length) False where a place is padding."""
        return np.asarray(np.arange(self.length) < np.array(self.lengths)[:, None])

    def gather_rows(self, num_heads: int) -> NDArray[np.int32]:
        """Rows of a (T, 3, num_heads) array, flattened, in the order (3, num_texts, num_heads, length).

        A text's last token fills its padded places.
        """
        lengths = np.array(self.lengths)
        starts = self.start + np.cumsum(lengths) - lengths
        tokens = starts[:, None] + np.minimum(np.arange(self.length), lengths[:, None] - 1)  # (num_texts, length)
        heads = np.arange(3 * num_heads).reshape(3, 1, num_heads, 1)
        rows = tokens[:, None, :] * (3 * num_heads) + heads
        return np.asarray(rows, dtype=np.int32).reshape(-1)

    def scatter_rows(self, num_heads: int) -> NDArray[np.int32]:
        """Rows of a (num_texts, num_heads, length) array, flattened, in the order (token, num_heads)."""
        texts, places = np.nonzero(self.is_token())
        rows = (texts * num_heads * self.length + places)[:, None] + np.arange(num_heads) * self.length
        return rows.astype(np.int32).reshape(-1)


def pack(sequences: Sequence[NDArray[np.int32]]) -> Packed:
    """`sequences` must come longest first, none of them empty."""
    ids = np.concatenate(sequences, dtype=np.int32)
    lengths = np.array([len(sequence) for sequence in sequences])
    return Packed(ids, _positions(ids, lengths), tuple(lengths.tolist()))


def _positions(ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """As transformers' create_position_ids_from_input_ids: 2, 3, 4...

    A padding token written out in the text ("<pad>") takes position 1 and moves nobody.
    """
    counted = ids != PADDING_ID
    running = np.cumsum(counted)
    ends = np.cumsum(lengths)
    before = running[ends - 1]  # counted tokens up to each text's end
    offsets = np.repeat(np.concatenate(([0], before[:-1])), lengths)
    return np.asarray((running - offsets) * counted + PADDING_ID, dtype=np.int32)


def plan_groups(lengths: Sequence[int], max_scores_per_head: int) -> Iterator[Group]:
    """Cuts texts, longest first, into groups of at most `max_scores_per_head` attention scores (n * L * L).

    A single text may have more: it stands alone then.
    """
    first = token = 0
    while first < len(lengths):
        longest = lengths[first]
        shortest = longest - max(MAX_PADDING_TOKENS, int(longest * MAX_PADDING_SHARE))
        room = max(1, max_scores_per_head // (longest * longest))
        last = first + 1
        while last < len(lengths) and last - first < room and lengths[last] >= shortest:
            last += 1
        members = tuple(lengths[first:last])
        yield Group(token, token + sum(members), members)
        token += sum(members)
        first = last
