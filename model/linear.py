"""The matrix products of the encoder, with what follows each of them, in torch's operators.

Knows no model: three ways to use a weight (plain, then GELU, plus a residual), so that they can be fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

#: Where the fused operators are used. Not in float32: they are 20-30% faster there, but sum long rows one product
#: after the other, which doubles the rounding error of a product (K = 3072: 9.6e-7 rms, plain 4.4e-7). About one
#: text in 400 magnifies that to 1e-5 in its vector, and float32 promises 2e-6.
FUSED_DTYPES = (torch.bfloat16,)
#: How far the fused operators may be from the plain ones in the trial, relative to the largest output: one
#: rounding of bfloat16 where the plain way has two.
TRIAL_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """x W^T + b as it is stored; W is weight, or, where it is int8, weight * scale * input_factor."""

    #: (out_features, in_features)
    weight: Tensor
    #: (out_features,)
    bias: Tensor
    #: (out_features,) float32, with int8 weights only
    scale: Tensor | None = None
    #: (in_features,) float32 by which inputs are multiplied before they are quantized; None: as they are
    input_factor: Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        return self.scale is not None

    def dequantized(self) -> LinearWeights:
        """The float32 weights which the int8 ones stand for; others as they are."""
        if self.scale is None:
            return self
        weight = self.weight.float() * self.scale[:, None]
        return LinearWeights(weight if self.input_factor is None else weight * self.input_factor, self.bias)

    def to(self, device: torch.device, dtype: torch.dtype) -> LinearWeights:
        """Weights that are floats, as `dtype` on `device`."""
        return LinearWeights(self.weight.to(device, dtype), self.bias.to(device, dtype))


class Linear(Protocol):
    """x W^T + b for x of (rows, in_features)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor:
        """GELU by the exact erf, of the product."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual` of (rows, out_features), in the residual's dtype."""


class PlainLinear:
    """For every device and dtype."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weights: LinearWeights) -> None:
        self._weight = weights.weight
        self._bias = weights.bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        return functional.gelu(self(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


class OneDnnLinear:
    """For CPUs: the weight stored once in oneDNN's own order, GELU and residual done while tiles are in the cache.

    The operators are those torch's own compiler emits (torch/_inductor/fx_passes/mkldnn_fusion.py); they are
    private, so `onednn_agrees` tries them first.
    """

    __slots__ = ("_bias", "_weight")

    def __init__(self, weights: LinearWeights) -> None:
        self._weight = _operators()._reorder_linear_weight(weights.weight, None)
        self._bias = weights.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._pointwise(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return self._pointwise(x, "gelu")

    def _pointwise(self, x: Tensor, operation: str) -> Tensor:
        # The last argument says which GELU: "none" is the exact one, as opposed to "tanh".
        result: Tensor = _operators()._linear_pointwise(x, self._weight, self._bias, operation, [], "none")
        return result

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        result: Tensor = _operators()._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return result


def _operators() -> Any:
    return torch.ops.mkldnn


@cache
def onednn_agrees(dtype: torch.dtype) -> bool:
    """Whether the private operators exist in this torch and mean what they did."""
    if dtype not in FUSED_DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 48), (32, 48), (32,), (7, 32))
    )
    weights = LinearWeights(weight, bias)
    plain = PlainLinear(weights)
    try:
        fused = OneDnnLinear(weights)
        pairs = [
            (fused(x), plain(x)),
            (fused.gelu(x), plain.gelu(x)),
            (fused.add(x, residual), plain.add(x, residual)),
        ]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(float((a - b).abs().max() / b.abs().max()) <= TRIAL_TOLERANCE for a, b in pairs)
