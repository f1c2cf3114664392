"""One vector a text from one vector a token.

Knows packed hidden states and lengths, not where they came from. Formulas and names as in sentence-transformers'
`Pooling` (sentence_transformers/sentence_transformer/modules/pooling.py); sums are float32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """The tokens that are pooled, text after text, none without a token."""

    #: (T, hidden) float32
    hidden: Tensor
    #: (n,) int64
    lengths: Tensor
    #: (n,) int64 tokens of each text that stood before these and are not here
    skipped: Tensor


Reduce = Callable[[Segments], Tensor]


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[str], skipped: Tensor | None = None) -> Tensor:
    """(n, len(modes) * hidden) float32.

    hidden: (T, hidden) the texts' tokens one after the other; lengths: (n,) int64 on the same device, none zero.
    skipped: (n,) int64 how many tokens at each text's beginning have no say, fewer than it has.
    """
    hidden = hidden.float()
    if skipped is None:
        segments = Segments(hidden, lengths, torch.zeros_like(lengths))
    else:
        is_pooled = _places(lengths, len(hidden)) >= _repeat(skipped, lengths, len(hidden))
        segments = Segments(hidden[is_pooled], lengths - skipped, skipped)
    return torch.cat([POOLING_MODES[mode](segments) for mode in modes], dim=1)


def _repeat(values: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """(T,) each text's value for each of its tokens."""
    # Without `output_size` a GPU's host would wait for the sum of the lengths.
    return torch.repeat_interleave(values, lengths, output_size=num_tokens)


def _places(lengths: Tensor, num_tokens: int) -> Tensor:
    """(T,) each token's place in its text, from 0."""
    return torch.arange(num_tokens, device=lengths.device) - _repeat(lengths.cumsum(0) - lengths, lengths, num_tokens)


def _cls(tokens: Segments) -> Tensor:
    return tokens.hidden[tokens.lengths.cumsum(0) - tokens.lengths]


def _last_token(tokens: Segments) -> Tensor:
    return tokens.hidden[tokens.lengths.cumsum(0) - 1]


def _max(tokens: Segments) -> Tensor:
    return torch.segment_reduce(tokens.hidden, "max", lengths=tokens.lengths, unsafe=True)


def _sum(tokens: Segments) -> Tensor:
    return torch.segment_reduce(tokens.hidden, "sum", lengths=tokens.lengths, unsafe=True)


def _mean(tokens: Segments) -> Tensor:
    return _sum(tokens) / tokens.lengths[:, None]


def _mean_sqrt_len(tokens: Segments) -> Tensor:
    return _sum(tokens) / tokens.lengths[:, None].sqrt()


def _weighted_mean(tokens: Segments) -> Tensor:
    """Weights 1, 2, 3...: later tokens count more. Those skipped have had theirs."""
    lengths, skipped, num_tokens = tokens.lengths, tokens.skipped, len(tokens.hidden)
    weights = _places(lengths, num_tokens) + 1 + _repeat(skipped, lengths, num_tokens)
    weighted = Segments(tokens.hidden * weights[:, None], lengths, skipped)
    return _sum(weighted) / (lengths * (lengths + 1) / 2 + lengths * skipped)[:, None]


#: In the order in which sentence-transformers concatenates them.
POOLING_MODES: dict[str, Reduce] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
