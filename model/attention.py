"""Attention over packed texts: three ways to the same numbers.

    bmm     batched matrix products over groups of near-equal length; bias and mask are the product's additive operand
    sdpa    torch's scaled_dot_product_attention over the same groups
    native  text by text in this package's own CPU kernels; nothing is padded

Knows packed tokens and the position bias; no weights. What an attention prepares for one batch serves all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embedq.model.packing import Group, plan_groups
from embedq.model.position_bias import PositionBias

AttentionName = Literal["auto", "bmm", "sdpa", "native"]
ATTENTION_NAMES: tuple[str, ...] = get_args(AttentionName)

#: (T, 3 * hidden) queries, keys and values of packed texts to their (T, hidden) context
Attend = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """softmax(Q K^T / sqrt(head_dim) + bias) V, each text by itself."""

    def host_arrays(self, lengths: Sequence[int]) -> list[NDArray[Any]]:
        """What `prepare` needs on the device, for a batch of texts with so many tokens each, the longest first."""

    def prepare(self, lengths: Sequence[int], arrays: Sequence[Tensor]) -> Attend:
        """arrays: `host_arrays` of the same lengths, on the device."""

    def num_cells(self, lengths: Sequence[int]) -> int:
        """Pairs of query and key that are computed for such a batch, those of padding included."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What one group needs beyond queries, keys and values."""

    group: Group
    #: (num_texts, heads, L, L) contiguous, -inf where the key is padding
    bias: Tensor
    #: (3 * num_texts * heads * L,) which rows of qkv as (T * 3 * heads, head_dim) make up queries, keys, values
    gather: Tensor
    #: (tokens * heads,) which rows of the context as (num_texts * heads * L, head_dim) are no padding
    scatter: Tensor


#: query, key, value (n * heads, L, head_dim) and bias as in GroupPlan to the context (n * heads, L, head_dim)
Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """For every device and dtype: texts of near-equal length side by side, padded to the group's longest."""

    position_bias: PositionBias
    product: Product
    #: bounds the attention scores computed at once, in elements (heads * n * L * L)
    max_scores: int

    def host_arrays(self, lengths: Sequence[int]) -> list[NDArray[Any]]:
        heads = self.position_bias.num_heads
        return [
            array
            for group in self._groups(lengths)
            for array in (group.gather_rows(heads), group.scatter_rows(heads), ~group.is_token())
        ]

    def num_cells(self, lengths: Sequence[int]) -> int:
        return sum([group.num_cells for group in self._groups(lengths)])

    def _groups(self, lengths: Sequence[int]) -> Iterator[Group]:
        return plan_groups(lengths, self.max_scores // self.position_bias.num_heads)

    def prepare(self, lengths: Sequence[int], arrays: Sequence[Tensor]) -> Attend:
        heads = self.position_bias.num_heads
        plans = [
            self._plan(group, *arrays[3 * index : 3 * index + 3]) for index, group in enumerate(self._groups(lengths))
        ]

        def attend(qkv: Tensor) -> Tensor:
            hidden = qkv.shape[1] // 3
            head_dim = hidden // heads
            rows = qkv.view(-1, head_dim)  # (T * 3 * heads, head_dim)
            context = torch.empty((len(qkv), hidden), dtype=qkv.dtype, device=qkv.device)
            for plan in plans:
                gathered = rows.index_select(0, plan.gather).view(3, -1, plan.group.length, head_dim)
                query, key, value = gathered.unbind()
                attended = self.product(query, key, value, plan.bias)
                place = context[plan.group.start : plan.group.end].view(-1, head_dim)
                torch.index_select(attended.view(-1, head_dim), 0, plan.scatter, out=place)
            return context

        return attend

    def _plan(self, group: Group, gather: Tensor, scatter: Tensor, is_padding: Tensor) -> GroupPlan:
        """is_padding: (num_texts, L)"""
        bias = self.position_bias.matrix(group.length).expand(len(group.lengths), -1, -1, -1)
        if group.is_ragged:
            bias = bias.masked_fill(is_padding[:, None, None, :], -math.inf)
        return GroupPlan(group, bias.contiguous(), gather, scatter)


def batched_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """One batched product with everything added inside it, a softmax, another batched product."""
    # alpha scales inside the product, before float16 could overflow
    scores = torch.baddbmm(bias.flatten(0, 1), query, key.transpose(1, 2), alpha=1 / math.sqrt(query.shape[-1]))
    return torch.bmm(scores.softmax(-1), value)


def sdpa_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """torch chooses the kernel: with a bias it is the memory-efficient or the plain one."""
    shape = (*bias.shape[:2], *query.shape[1:])
    attended = functional.scaled_dot_product_attention(
        query.view(shape), key.view(shape), value.view(shape), attn_mask=bias
    )
    return attended.flatten(0, 1).contiguous()


PRODUCTS: dict[str, Product] = {"bmm": batched_product, "sdpa": sdpa_product}
