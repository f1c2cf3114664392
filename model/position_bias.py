"""MPNet's relative position bias: what attention adds to the score of a key for a query, by their distance.

One table for all layers, as in transformers' models/mpnet/modeling_mpnet.py. Knows no texts and no attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embedq.model.config import MAX_DISTANCE


def relative_position_bucket(offsets: Tensor, num_buckets: int) -> Tensor:
    """Which row of the bias table an offset j - i (key minus query) takes: as the reference, equal for all offsets.

    Half the buckets are for keys behind the query, half for those ahead; half of each half for one distance
    each, the rest for logarithmically growing ranges up to MAX_DISTANCE.
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    distance = offsets.abs()
    # The reference's own order of float32 operations: another one moves borders by a token.
    scaled = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (per_side - exact)
    # log(0) is -inf, which has no integer; those places are taken by `distance` anyway.
    far = (exact + scaled.clamp(min=0).to(torch.long)).clamp(max=per_side - 1)
    side = (offsets > 0).to(torch.long) * per_side
    return side + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, slots=True)
class PositionBias:
    """Computed once: it depends only on j - i, so every length's matrix is a window of one small table."""

    #: (heads, 2 * reach + 1) contiguous: the bias of offset -reach, ..., reach
    by_offset: Tensor

    @classmethod
    def from_buckets(cls, by_bucket: Tensor, max_length: int) -> PositionBias:
        """by_bucket: (num_buckets, heads), the checkpoint's embedding; max_length: tokens of the longest text."""
        reach = max_length - 1
        buckets = relative_position_bucket(torch.arange(-reach, reach + 1), len(by_bucket))
        return cls(by_bucket[buckets.to(by_bucket.device)].t().contiguous())

    @property
    def num_heads(self) -> int:
        return self.by_offset.shape[0]

    @property
    def reach(self) -> int:
        """The largest distance there is."""
        return self.by_offset.shape[1] // 2

    def matrix(self, length: int) -> Tensor:
        """(heads, length, length) bias of query i for key j."""
        offsets = self.by_offset[:, self.reach - length + 1 : self.reach + length]  # -(length - 1) .. length - 1
        # Window w holds offsets w - (length - 1) .. w: the row of query i = length - 1 - w.
        return offsets.unfold(1, length, 1).flip(1)
