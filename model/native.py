"""This package's own CPU kernels (model/kernels/*.cpp): matrix products and attention for x86 with AVX-512.

Knows the C interface and which CPUs can run it; no model. The library is built with the package where a C++ compiler
is found, and everything here has a slower way in torch where it is not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedq.model.attention import Attend
from embedq.model.cpu import cpu_flags
from embedq.model.linear import LinearWeights
from embedq.model.position_bias import PositionBias

#: Features of a multiple of this many only: the width of a tile.
COLUMNS = 32
#: Tokens of the longest text that attention takes.
MAX_KEYS = 1024
#: What follows a product, as in linear.h.
NOTHING, GELU, ADD = range(3)

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
#: What the CPU must have for products in each type.
_REQUIRED = {
    torch.float32: _AVX512,
    torch.bfloat16: _AVX512 | {"avx512_bf16"},
    torch.int8: _AVX512 | {"avx512_vnni"},
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def is_built() -> bool:
    return _library() is not None


def runs(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` run here: the library is there and the CPU has what they need."""
    return dtype in _REQUIRED and _REQUIRED[dtype] <= cpu_flags() and is_built()


def knows(dtype: torch.dtype) -> bool:
    return dtype in _REQUIRED


@cache
def _library() -> ctypes.CDLL | None:
    files = sorted(Path(__file__).parent.glob("_native*.so"))
    if not files:
        return None
    library = ctypes.CDLL(str(files[0]))
    # A symbol is looked up in what torch itself is linked to: the threads are the ones that torch has already.
    with_openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    team = getattr(with_openmp, "GOMP_parallel", None)
    if team is None:
        return None
    library.embedq_set_team.argtypes = [ctypes.c_void_p]
    library.embedq_set_team(ctypes.cast(team, ctypes.c_void_p))
    return library


class _LinearStruct(ctypes.Structure):
    _fields_ = (
        ("in_features", ctypes.c_long),
        ("out_features", ctypes.c_long),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("weight_sum", ctypes.c_void_p),
        ("input_factor", ctypes.c_void_p),
    )


class _AttentionStruct(ctypes.Structure):
    _fields_ = (
        ("num_heads", ctypes.c_long),
        ("head_dim", ctypes.c_long),
        ("bias", ctypes.c_void_p),
        ("reach", ctypes.c_long),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeLinear:
    """Fulfils `Linear` for a CPU; the weight is kept in the order in which tiles read it.

    Takes float32 or bfloat16 rows, gives `out_dtype`; `add` takes and gives float32.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        """dtype: of the products; int8 for quantized weights alone. Raises ValueError unless `fits`."""
        out_features, in_features = weights.weight.shape
        if in_features % COLUMNS or out_features % COLUMNS:
            raise ValueError(f"{out_features} x {in_features} is no multiple of {COLUMNS}")
        self._out_features = out_features
        self._out_dtype = out_dtype
        name = _NAMES[dtype]
        library = _library()
        if library is None:
            raise ValueError("the library is not built")
        self._apply = getattr(library, f"embedq_{name}_linear")
        weight = weights.weight.to(dtype).contiguous()
        # Everything the struct points to must live as long as it.
        self._packed = torch.empty_like(weight)
        getattr(library, f"embedq_{name}_pack")(
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_long(out_features),
            ctypes.c_long(in_features),
            ctypes.c_void_p(self._packed.data_ptr()),
        )
        self._bias = weights.bias.float().contiguous()
        self._scale = weights.scale
        self._sum = None if weights.scale is None else weight.sum(1, dtype=torch.int32)
        self._input_factor = weights.input_factor
        self._struct = _LinearStruct(
            in_features,
            out_features,
            *map(_address, (self._packed, self._bias, self._scale, self._sum, self._input_factor)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, NOTHING, self._out_dtype, None)

    def gelu(self, x: Tensor) -> Tensor:
        return self._run(x, GELU, self._out_dtype, None)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._run(x, ADD, torch.float32, residual.contiguous())

    def _run(self, x: Tensor, after: int, out_dtype: torch.dtype, residual: Tensor | None) -> Tensor:
        x = x.contiguous()
        y = torch.empty((len(x), self._out_features), dtype=out_dtype)
        self._apply(
            ctypes.byref(self._struct),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int(x.dtype == torch.bfloat16),
            ctypes.c_long(len(x)),
            ctypes.c_int(after),
            ctypes.c_void_p(_address(residual)),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int(out_dtype == torch.bfloat16),
            ctypes.c_int(torch.get_num_threads()),
        )
        return y


class NativeAttention:
    """Fulfils `Attention` in float32 or bfloat16; heads of a multiple of COLUMNS dimensions."""

    def __init__(self, position_bias: PositionBias, head_dim: int, dtype: torch.dtype) -> None:
        library = _library()
        if library is None or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"attention does not run in {dtype} here")
        self._attend = getattr(library, f"embedq_{_NAMES[dtype]}_attention")
        self._dtype = dtype
        self._bias = position_bias.by_offset.float().contiguous()
        self._struct = _AttentionStruct(position_bias.num_heads, head_dim, self._bias.data_ptr(), position_bias.reach)

    def host_arrays(self, _lengths: Sequence[int]) -> list[NDArray[Any]]:
        return []

    def prepare(self, lengths: Sequence[int], _arrays: Sequence[Tensor]) -> Attend:
        sizes = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes

        def attend(qkv: Tensor) -> Tensor:
            qkv = qkv.to(self._dtype).contiguous()
            context = torch.empty((len(qkv), qkv.shape[1] // 3), dtype=self._dtype)
            self._attend(
                ctypes.byref(self._struct),
                ctypes.c_void_p(qkv.data_ptr()),
                ctypes.c_void_p(starts.ctypes.data),
                ctypes.c_void_p(sizes.ctypes.data),
                ctypes.c_long(len(sizes)),
                ctypes.c_void_p(context.data_ptr()),
                ctypes.c_int(torch.get_num_threads()),
            )
            return context

        return attend
