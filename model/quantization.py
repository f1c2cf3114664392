"""int8 products: weights by output channel, inputs by token, both found without a table of activations.

A token's values are stored as byte = round(x / scale) + zero, with scale and zero such that its range, which always
holds 0, fills the 256 steps: GELU's output hardly goes below 0, and a symmetric range would waste half of them. The
products are exact integers, so every implementation of these formulas gives the same sums.

Smoothing (arXiv 2211.10438) divides input channels that have outliers by a factor and multiplies the weight's columns
by it; here the factor is applied while the token is quantized, because MPNet's norms feed the residual too.

Knows tensors; no files and no native code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from embedq.model.linear import LinearWeights

#: Largest magnitude of a quantized weight: symmetric, so that a sum over a row needs no zero point.
MAX_WEIGHT = 127
#: Shares of a row's largest magnitude that are tried as the end of its range; what lies beyond is cut.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
#: Rows quantized at a time: so many stay in the cache through all trials.
ROWS_AT_ONCE = 64
#: How much of the difficulty moves from inputs to weights: 0 nothing, 1 everything. By measurement on
#: all-mpnet-base-v2: 0.3, 0.5 and 0.7 give a smallest cosine of 0.9964, 0.9967 and 0.983; without 0.9937.
SMOOTHING = 0.5
#: Below this, a weight column or an input channel counts as unused.
SMALLEST = 1e-5
#: What `torch._int_mm` on CUDA takes: more than 16 rows, and features in multiples of 8.
MIN_ROWS, MULTIPLE = 32, 8


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) int8 and (out,) float32 scales, each row's range cut where the squared error is least."""
    parts = [_quantize_rows_of_weight(part.float()) for part in torch.split(weight, ROWS_AT_ONCE)]
    values, scales = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(scales)


def _quantize_rows_of_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    best, best_scale, best_error = weight, largest, torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        scale = largest * (clip / MAX_WEIGHT)
        rounded = (weight / scale).round_().clamp_(-MAX_WEIGHT, MAX_WEIGHT)
        error = torch.addcmul(weight, rounded, scale, value=-1).square_().sum(1, keepdim=True)
        is_better = error < best_error
        best, best_scale = torch.where(is_better, rounded, best), torch.where(is_better, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best.to(torch.int8), best_scale[:, 0]


def smoothing_factor(weight: Tensor, largest_inputs: Tensor) -> Tensor:
    """(in,) float32 by which inputs are multiplied, around 1.

    weight: (out, in); largest_inputs: (in,) the largest magnitude of each input over sample texts.
    """
    inputs = largest_inputs.float().clamp(min=SMALLEST)
    columns = weight.float().abs().amax(0).clamp(min=SMALLEST)
    divisor = inputs**SMOOTHING / columns ** (1 - SMOOTHING)
    return (divisor.log().mean() - divisor.log()).exp()


def quantize(weights: LinearWeights, largest_inputs: Tensor | None = None) -> LinearWeights:
    """int8 from float weights, smoothed if the inputs' magnitudes are known; quantized ones as they are."""
    if weights.is_quantized:
        return weights
    if largest_inputs is None:
        weight, scale = quantize_weight(weights.weight)
        return LinearWeights(weight, weights.bias, scale)
    factor = smoothing_factor(weights.weight, largest_inputs)
    weight, scale = quantize_weight(weights.weight.float() / factor)
    return LinearWeights(weight, weights.bias, scale, factor)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """x = scale * (bytes - zero), token by token."""

    #: (rows, features) int8: the byte 0..255 minus 128
    values: Tensor
    #: (rows, 1) float32
    scale: Tensor
    #: (rows, 1) int32: which byte is 0, minus 128
    zero: Tensor


def quantize_rows(x: Tensor) -> QuantizedRows:
    """x: (rows, features) of any float dtype."""
    x = x.float()
    low = x.amin(1, keepdim=True).clamp(max=0)
    span = x.amax(1, keepdim=True).clamp(min=0) - low
    scale = torch.where(span == 0, 1.0, span / 255)  # NaN stays NaN
    zero = (-low / scale).round()
    values = ((x * scale.reciprocal()).round() + zero).clamp(0, 255)
    return QuantizedRows((values - 128).to(torch.int8), scale, (zero - 128).to(torch.int32))


class Int8Linear:
    """Fulfils `Linear` by torch's integer product, on CPU and CUDA; outputs have the dtype of the inputs."""

    __slots__ = ("_bias", "_in_padding", "_input_factor", "_scale", "_sum", "_weight")

    def __init__(self, weights: LinearWeights, device: torch.device) -> None:
        """Raises ValueError unless `weights` are quantized."""
        if weights.scale is None:
            raise ValueError("the weights are not quantized")
        weight = weights.weight.to(device)
        self._sum = weight.sum(1, dtype=torch.int32)
        out_padding, self._in_padding = (-size % MULTIPLE for size in weight.shape)
        # (in, out): torch._int_mm wants the right operand by columns
        self._weight = functional.pad(weight, (0, self._in_padding, 0, out_padding)).t()
        self._scale = weights.scale.to(device, torch.float32)
        self._bias = weights.bias.to(device, torch.float32)
        factor = weights.input_factor
        self._input_factor = None if factor is None else factor.to(device, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x).to(x.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        return functional.gelu(self._product(x)).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return (self._product(x) + residual).to(residual.dtype)

    def _product(self, x: Tensor) -> Tensor:
        rows = quantize_rows(x if self._input_factor is None else x * self._input_factor)
        padding = (0, self._in_padding, 0, max(0, MIN_ROWS - len(x)))
        sums = torch._int_mm(functional.pad(rows.values, padding), self._weight)[: len(x), : len(self._bias)]
        exact = (sums - rows.zero * self._sum).float()
        return torch.addcmul(self._bias, exact, rows.scale * self._scale)
