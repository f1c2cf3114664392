"""Which implementation of products and attention runs a model on a device in a number type, and why.

The one place where a choice is made; knows every implementation, no weights and no texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from embedq.model import native
from embedq.model.attention import ATTENTION_NAMES, PRODUCTS, Attention, GroupedAttention
from embedq.model.config import MPNetConfig
from embedq.model.cpu import cpu_flags
from embedq.model.device import MAX_SCORES
from embedq.model.errors import DeviceError, ModelOptionError
from embedq.model.linear import Linear, LinearWeights, OneDnnLinear, PlainLinear, onednn_agrees
from embedq.model.position_bias import PositionBias
from embedq.model.quantization import Int8Linear

Kernels = Literal["auto", "native", "torch"]
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
#: Devices with integer products.
INT8_DEVICES = ("cpu", "cuda")
#: Compute capability from which bfloat16 runs on tensor cores (Ampere).
BFLOAT16_CAPABILITY = (8, 0)
#: Size of the product that is timed to decide between float32 and bfloat16 on a CPU, and how often: some 20 ms.
TRIAL_ROWS, TRIAL_FEATURES, TRIAL_ROUNDS = 96, 768, 5
#: bfloat16 must be this much faster than float32 to be worth its rounding.
WORTHWHILE = 1.2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """How a model computes."""

    device: torch.device
    #: of the weights in products; int8 if they are quantized
    dtype: torch.dtype
    #: of what goes from one product to the next
    activation_dtype: torch.dtype
    #: of the sums that go from layer to layer, and of norms
    residual_dtype: torch.dtype
    make_linear: Callable[[LinearWeights], Linear]
    make_attention: Callable[[PositionBias], Attention]
    #: for people
    description: str


def resolve_dtype(name: str, device: torch.device, *, is_quantized: bool = False) -> torch.dtype:
    """`auto` or a name of DTYPES; what was chosen and why is logged at INFO.

    is_quantized: whether the weights are stored as int8, which `auto` then takes where it can. Raises DeviceError.
    """
    if name != "auto":
        if name not in DTYPES:
            raise DeviceError(f"unknown dtype {name!r}: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    takes_int8 = is_quantized and device.type in INT8_DEVICES
    chosen, why = (torch.int8, "the weights are stored so") if takes_int8 else _auto_dtype(device)
    log.info("dtype %s: %s", dtype_name(chosen), why)
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        return _auto_cuda_dtype(device)
    if device.type != "cpu":
        return torch.float32, f"exact, and the safe choice on {device.type}"
    if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        return torch.float32, "this CPU has neither AVX512_BF16 nor AMX"
    speedup = _bfloat16_speedup()
    if speedup < WORTHWHILE:
        return torch.float32, f"bfloat16 is only {speedup:.1f} times as fast in a trial"
    return torch.bfloat16, f"{speedup:.1f} times as fast as float32 in a trial on this CPU; --dtype float32 is exact"


def _auto_cuda_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    capability = torch.cuda.get_device_capability(device)
    sm = f"{torch.cuda.get_device_name(device)} (sm{capability[0]}{capability[1]})"
    if capability >= BFLOAT16_CAPABILITY:
        return torch.bfloat16, f"{sm} computes it on tensor cores"
    return torch.float16, f"{sm} has no bfloat16 units"


@cache
def _bfloat16_speedup() -> float:
    cpu = torch.device("cpu")
    size = TRIAL_FEATURES
    # Numbers of its own: the process's random state is the caller's.
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    weights = LinearWeights(draw(size, size), draw(size))
    x = draw(TRIAL_ROWS, size)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        use_native = _lacks_native(dtype) is None and not _prefers_onednn(dtype)
        numbers = _native_numbers(dtype) if use_native else _torch_numbers(cpu, dtype)
        linear = numbers.make_linear(weights)
        linear(x.to(numbers.residual))
        seconds.append(min(_seconds(linear, x.to(numbers.residual)) for _ in range(TRIAL_ROUNDS)))
    return seconds[0] / seconds[1]


def _seconds(linear: Linear, x: Tensor) -> float:
    began_at = time.perf_counter()
    linear(x)
    return time.perf_counter() - began_at


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    config: MPNetConfig,
    *,
    kernels: str = "auto",
    attention: str = "auto",
    max_scores: int | None = None,
) -> Backend:
    """The fastest that runs here. kernels: `native` insists on this package's own, `torch` does without them.

    max_scores: bounds the attention scores computed at once, in elements; None: as suits the device.
    Raises ModelOptionError for a name that is none, DeviceError for a choice that cannot run here.
    """
    for name, value, known in (("kernels", kernels, get_args(Kernels)), ("attention", attention, ATTENTION_NAMES)):
        if value not in known:
            raise ModelOptionError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    if dtype == torch.int8 and device.type not in INT8_DEVICES:
        raise DeviceError(f"int8 runs on {' and '.join(INT8_DEVICES)}, not on {device.type}: use auto or float32")
    lacking = _lacks_native_for(device, dtype, config)
    if kernels == "native" and lacking is not None:
        raise DeviceError(f"native kernels cannot run {dtype_name(dtype)} here: {lacking}")
    use_native = kernels == "native" or (kernels == "auto" and lacking is None and not _prefers_onednn(dtype))
    numbers = _native_numbers(dtype) if use_native else _torch_numbers(device, dtype)
    if dtype == torch.int8 and device.type == "cpu" and not use_native:
        log.warning("int8 runs by torch's operators: %s; bfloat16 or float32 may be faster", lacking or "as asked for")
    if attention == "auto":
        fits = kernels != "torch" and _fits_native_attention(device, numbers.activation, config)
        attention = "native" if fits else "bmm"
    make_attention = _attention_maker(attention, device, numbers.activation, config, max_scores)
    description = f"{'native' if use_native else 'torch'} kernels, {attention} attention"
    log.info("%s on %s: %s", dtype_name(dtype), device, description)
    return Backend(
        device=device,
        dtype=dtype,
        activation_dtype=numbers.activation,
        residual_dtype=numbers.residual,
        make_linear=numbers.make_linear,
        make_attention=make_attention,
        description=description,
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    activation: torch.dtype
    residual: torch.dtype
    make_linear: Callable[[LinearWeights], Linear]


def _native_numbers(dtype: torch.dtype) -> _Numbers:
    """Sums between layers in float32, which costs nothing here; products and what lies between them as asked."""
    activation = torch.float32
    if dtype != torch.float32 and native.runs(torch.bfloat16):
        activation = torch.bfloat16

    def make_linear(weights: LinearWeights) -> Linear:
        if weights.is_quantized and not native.runs(torch.int8):
            return Int8Linear(weights, torch.device("cpu"))
        return native.NativeLinear(weights, torch.int8 if weights.is_quantized else activation, activation)

    return _Numbers(activation, torch.float32, make_linear)


def _torch_numbers(device: torch.device, dtype: torch.dtype) -> _Numbers:
    if dtype == torch.int8:
        dtype = _auto_cuda_dtype(device)[0] if device.type == "cuda" else torch.float32
    fused = device.type == "cpu" and onednn_agrees(dtype)

    def make_linear(weights: LinearWeights) -> Linear:
        if weights.is_quantized:
            return Int8Linear(weights, device)
        weights = weights.to(device, dtype)
        return OneDnnLinear(weights) if fused else PlainLinear(weights)

    return _Numbers(dtype, dtype, make_linear)


def _lacks_native(dtype: torch.dtype) -> str | None:
    """Why the native kernels cannot multiply in `dtype`; None if they can."""
    if native.runs(dtype):
        return None
    if (reason := native.missing()) is not None:
        return reason
    return "this CPU lacks what they need" if native.knows(dtype) else "they have no such type"


def _lacks_native_for(device: torch.device, dtype: torch.dtype, config: MPNetConfig) -> str | None:
    if device.type != "cpu":
        return f"they run on a CPU, not on {device.type}"
    if config.hidden_size % native.COLUMNS or config.intermediate_size % native.COLUMNS:
        return f"hidden sizes must be multiples of {native.COLUMNS}"
    return _lacks_native(dtype)


def _prefers_onednn(dtype: torch.dtype) -> bool:
    """AMX multiplies bfloat16 several times faster than AVX-512, and oneDNN knows how."""
    return dtype == torch.bfloat16 and "amx_bf16" in cpu_flags() and onednn_agrees(dtype)


def _fits_native_attention(device: torch.device, dtype: torch.dtype, config: MPNetConfig) -> bool:
    return device.type == "cpu" and native.attends(dtype, config.head_dim, config.max_length)


def _attention_maker(
    name: str, device: torch.device, dtype: torch.dtype, config: MPNetConfig, max_scores: int | None
) -> Callable[[PositionBias], Attention]:
    if name != "native":
        product, bound = PRODUCTS[name], max_scores or MAX_SCORES[device.type]
        return lambda bias: GroupedAttention(PositionBias(bias.by_offset.to(dtype)), product, bound)
    if not _fits_native_attention(device, dtype, config):
        raise DeviceError(f"native attention cannot run this model in {dtype_name(dtype)} on this {device.type}")
    return lambda bias: native.NativeAttention(bias, config.head_dim, dtype)
