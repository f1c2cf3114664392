"""The matrix products of the encoder, with what follows each of them.

Knows no model: three ways to use a weight (plain, then GELU, plus a residual), so that a backend can fuse them.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Linear(Protocol):
    """x W^T + b for x of (rows, in_features)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def gelu(self, x: Tensor) -> Tensor:
        """GELU by the exact erf, of the product."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual` of (rows, out_features)."""


class PlainLinear:
    """For every device and dtype."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        return functional.gelu(self(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


class OneDnnLinear:
    """For CPUs: the weight stored once in oneDNN's own order, GELU and residual done while tiles are in the cache.

    The operators are those torch's own compiler emits (torch/_inductor/fx_passes/mkldnn_fusion.py); they are
    private, so `linear_for` tries them first.
    """

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = _operators()._reorder_linear_weight(weight, None)
        self._bias = bias

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


def linear_for(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Linear]:
    """The fastest class that works here, to be made from (out_features, in_features) weight and bias."""
    return OneDnnLinear if device.type == "cpu" and _onednn_agrees(dtype) else PlainLinear


def _operators() -> Any:
    return torch.ops.mkldnn


@cache
def _onednn_agrees(dtype: torch.dtype) -> bool:
    """Whether the private operators exist in this torch and mean what they did."""
    if dtype not in FUSED_DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 48), (32, 48), (32,), (7, 32))
    )
    plain = PlainLinear(weight, bias)
    try:
        fused = OneDnnLinear(weight, bias)
        pairs = [
            (fused(x), plain(x)),
            (fused.gelu(x), plain.gelu(x)),
            (fused.add(x, residual), plain.add(x, residual)),
        ]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(float((a - b).abs().max() / b.abs().max()) <= TRIAL_TOLERANCE for a, b in pairs)
