"""One vector a text from one vector a token.

Knows packed hidden states and lengths, not where they came from. Formulas and names as in sentence-transformers'
`Pooling` (sentence_transformers/sentence_transformer/modules/pooling.py); sums are float32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor, Tensor], Tensor]


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[str]) -> Tensor:
    """(n, len(modes) * hidden) float32.

    hidden: (T, hidden) the texts' tokens one after the other; lengths: (n,) int64 on the same device, none zero.
    """
    hidden = hidden.float()
    return torch.cat([POOLING_MODES[mode](hidden, lengths) for mode in modes], dim=1)


def _cls(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - lengths]


def _last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - 1]


def _max(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "max", lengths=lengths, unsafe=True)


def _sum(hidden: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(hidden, "sum", lengths=lengths, unsafe=True)


def _mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    return _sum(hidden, lengths) / lengths[:, None]


def _mean_sqrt_len(hidden: Tensor, lengths: Tensor) -> Tensor:
    return _sum(hidden, lengths) / lengths[:, None].sqrt()


def _weighted_mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Weights 1, 2, 3...: later tokens count more."""
    # Without `output_size` a GPU's host would wait for the sum of the lengths.
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths, output_size=len(hidden))
    weights = torch.arange(1, len(hidden) + 1, device=hidden.device) - starts
    return _sum(hidden * weights[:, None], lengths) / (lengths * (lengths + 1) / 2)[:, None]


#: In the order in which sentence-transformers concatenates them.
POOLING_MODES: dict[str, Reduce] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
