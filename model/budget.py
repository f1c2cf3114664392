"""How much memory a micro-batch takes, and so how many tokens one may have. Arithmetic only: no device, no tensors.

It follows `mpnet` and `pooling` step by step and always takes the worst: attention in which every text is padded
as far as a group may be, the pooling mode that copies most. A test holds it above what is really live.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedq.model.config import MPNetConfig
from embedq.model.packing import MAX_PADDING_SHARE, MAX_PADDING_TOKENS

#: The part of the free memory that a micro-batch may take; the rest is for the allocator's rounding, the matrix
#: library's workspace and whoever shares the device.
SHARE_OF_FREE = 0.8
#: Places in attention for one token at worst: a text of one token beside the longest that may pad it.
PLACES_PER_TOKEN = 1 + MAX_PADDING_TOKENS
_INDEX_BYTES = 4
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """What decides the memory of a micro-batch beside its tokens."""

    config: MPNetConfig
    #: of an activation
    element_bytes: int
    #: attention scores computed at once, unless one text alone has more
    max_scores: int
    #: tokens of the longest text
    longest: int
    #: numbers that pooling gives for a text
    pooled_dim: int

    def num_bytes(self, num_tokens: int) -> int:
        """Never less than what a micro-batch of so many tokens, or of one longest text, has live at once."""
        num_tokens = max(num_tokens, self.longest)
        return num_tokens * self._bytes_per_token() + self._bytes_of_scores(num_tokens)

    def _bytes_per_token(self) -> int:
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        # x, queries keys and values packed, their context; then once more as rows of a group, with the result
        attention = self.element_bytes * hidden * (5 + 4 * PLACES_PER_TOKEN)
        # x of this layer and of the one before, the product and its GELU or the sum and its norm
        feed_forward = self.element_bytes * (2 * hidden + 2 * max(hidden, intermediate))
        # hidden states, the same in float32 and once more weighted; a text may be one token, and its vector is
        # there as the parts, as one and divided
        pooling = hidden * (self.element_bytes + 2 * _FLOAT32_BYTES) + 3 * self.pooled_dim * _FLOAT32_BYTES
        return max(attention, feed_forward, pooling) + self._index_bytes_per_token() + self._bias_bytes_per_token()

    def _index_bytes_per_token(self) -> int:
        """Ids, positions, a text's length (8 bytes), rows to gather and to scatter, a flag for each place."""
        heads = self.config.num_attention_heads
        return _INDEX_BYTES * (4 + heads * (3 * PLACES_PER_TOKEN + 1)) + PLACES_PER_TOKEN

    def _bias_bytes_per_token(self) -> int:
        """A row of the longest text, with its padding, for each head; all groups' are live through all layers."""
        places = max(self.longest / (1 - MAX_PADDING_SHARE), PLACES_PER_TOKEN**2)
        return int(self.element_bytes * self.config.num_attention_heads * places) + 1

    def _bytes_of_scores(self, num_tokens: int) -> int:
        """Scores and their softmax of one group, and one length's bias before it is repeated for its texts."""
        one_text = self.config.num_attention_heads * self.longest**2
        all_texts = num_tokens * self._bias_bytes_per_token() // self.element_bytes
        scores = max(min(self.max_scores, all_texts), one_text)
        return self.element_bytes * (2 * scores + one_text)


def tokens_that_fit(footprint: Footprint, free_bytes: int, most: int) -> int:
    """`most`, halved until it fits into its share of `free_bytes`; no less than the longest text has."""
    num_tokens = most
    while num_tokens > footprint.longest and footprint.num_bytes(num_tokens) > free_bytes * SHARE_OF_FREE:
        num_tokens //= 2
    return max(num_tokens, footprint.longest)
