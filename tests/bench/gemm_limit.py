"""How fast the encoder could be if it did nothing but its matrix products: weights stored in oneDNN's own order.

The four linear layers of each block on random numbers, no GELU, no residual, no attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from embedq.model.config import MPNetConfig

Product = Callable[[Tensor], Tensor]


def micro_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[int]:
    """Tokens of each micro-batch that texts of these lengths are cut into, the longest first."""
    batches: list[int] = []
    for length in sorted(lengths, reverse=True):
        if batches and batches[-1] + length <= max_batch_tokens:
            batches[-1] += length
        else:
            batches.append(length)
    return batches


class GemmLimit:
    def __init__(self, config: MPNetConfig, dtype: str) -> None:
        """`dtype`: float32, bfloat16 or int8."""
        self._integer = dtype == "int8"
        self._dtype = torch.int8 if self._integer else getattr(torch, dtype)
        hidden, intermediate = config.hidden_size, config.intermediate_size
        # in_features, out_features of qkv, attention output, intermediate, output
        self._shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, intermediate), (intermediate, hidden)]
        # Each block has weights of its own: one block's would stay in the cache.
        self._blocks = [[self._product(*shape) for shape in self._shapes] for _ in range(config.num_hidden_layers)]

    def _product(self, in_features: int, out_features: int) -> Product:
        if self._integer:
            matrix = self._random(in_features, out_features)
            return lambda x: torch._int_mm(x, matrix)
        operators: Any = torch.ops.mkldnn
        weight = operators._reorder_linear_weight(self._random(out_features, in_features), None)
        bias = self._random(out_features)
        return lambda x: operators._linear_pointwise(x, weight, bias, "none", [], "none")

    def _random(self, *shape: int) -> Tensor:
        return (
            torch.randint(-127, 128, shape, dtype=torch.int8) if self._integer else torch.randn(shape).to(self._dtype)
        )

    def seconds(self, batches: Sequence[int]) -> float:
        """Of all products for micro-batches of so many tokens."""
        inputs = {
            (num_tokens, in_features): self._random(num_tokens, in_features)
            for num_tokens in set(batches)
            for in_features, _ in self._shapes
        }
        began_at = time.perf_counter()
        with torch.inference_mode():
            for num_tokens in batches:
                for block in self._blocks:
                    for product, (in_features, _) in zip(block, self._shapes, strict=True):
                        product(inputs[num_tokens, in_features])
        return time.perf_counter() - began_at
