"""This package's own CPU kernels (model/kernels/*.cpp): matrix products and attention for x86 with AVX-512.

Knows the C interface and which CPUs can run it; no model. The library is built with the package where a C++ compiler
is found, and everything here has a slower way in torch where it is not.
"""

from __future__ import annotations

import ctypes
import logging
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
#: Tokens of the longest text that attention takes; the same in attention.h.
MAX_KEYS = 1024
#: What follows a product, as in linear.h.
NOTHING, GELU, ADD = range(3)
#: Of the functions and structs in the library; the same in team.cpp.
INTERFACE = 1

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
#: What the CPU must have for products in each type.
_REQUIRED = {
    torch.float32: _AVX512,
    torch.bfloat16: _AVX512 | {"avx512_bf16"},
    torch.int8: _AVX512 | {"avx512_vnni"},
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}

log = logging.getLogger(__name__)


def missing() -> str | None:
    """Why the library is not there, for people; None if it is."""
    library = _library()
    return library if isinstance(library, str) else None


def runs(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` run here: the library is there and the CPU has what they need."""
    return dtype in _REQUIRED and _REQUIRED[dtype] <= cpu_flags() and missing() is None


def attends(dtype: torch.dtype, head_dim: int, max_length: int) -> bool:
    """Whether attention in `dtype` runs here, for heads and texts of such a size."""
    return dtype != torch.int8 and runs(dtype) and head_dim % COLUMNS == 0 and max_length <= MAX_KEYS


def knows(dtype: torch.dtype) -> bool:
    return dtype in _REQUIRED


@cache
def _library() -> ctypes.CDLL | str:
    """The library, ready to be called, or why it is not there."""
    files = sorted(Path(__file__).parent.glob("_native*.so"))
    if not files:
        return "they were not built with this installation, for want of a C++ compiler or of x86"
    try:
        return _load(files[0])
    except (OSError, AttributeError) as err:
        # Another kind of CPU's, left over from another version, or a torch with other threads.
        reason = f"they cannot be loaded ({err}): install embedq again"
        log.warning("native kernels: %s; torch's operators compute instead", reason)
        return reason


def _load(path: Path) -> ctypes.CDLL:
    """Raises OSError and AttributeError."""
    library = ctypes.CDLL(str(path))
    if (found := library.embedq_interface()) != INTERFACE:
        raise OSError(f"{path} has interface {found}, not {INTERFACE}")
    # A symbol is looked up in what torch itself is linked to: the threads are the ones that torch has already.
    with_openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.embedq_set_team.argtypes = [ctypes.c_void_p]
    library.embedq_set_team(ctypes.cast(with_openmp.GOMP_parallel, ctypes.c_void_p))
    return library


def _function(dtype: torch.dtype, name: str) -> Any:
    """Raises ValueError for a type that does not run here: the CPU would stop the process."""
    library = _library()
    if isinstance(library, str) or not runs(dtype):
        raise ValueError(f"no kernels run in {dtype} here")
    return getattr(library, f"embedq_{_NAMES[dtype]}_{name}")


def _check(status: int) -> None:
    if status:
        raise torch.OutOfMemoryError("native kernels: can't allocate memory")


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


def _floats(tensor: Tensor | None) -> Tensor | None:
    """What a `const float*` may point to, whatever type a file has it in."""
    return None if tensor is None else tensor.float().contiguous()


class NativeLinear:
    """Fulfils `Linear` for a CPU; the weight is kept in the order in which tiles read it.

    Takes float32 or bfloat16 rows, gives `out_dtype`; `add` takes and gives float32.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        """dtype: of the products; int8 for quantized weights and for no others.

        Raises ValueError for weights that do not fit, and unless `runs`.
        """
        out_features, in_features = weights.weight.shape
        if in_features % COLUMNS or out_features % COLUMNS:
            raise ValueError(f"{out_features} x {in_features} is no multiple of {COLUMNS}")
        if weights.is_quantized != (dtype == torch.int8):
            raise ValueError(f"products in {dtype} of {weights.weight.dtype} weights")
        self._out_features = out_features
        self._out_dtype = out_dtype
        self._apply = _function(dtype, "linear")
        weight = weights.weight.to(dtype).contiguous()
        # Everything the struct points to must live as long as it.
        self._packed = torch.empty_like(weight)
        _function(dtype, "pack")(
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_long(out_features),
            ctypes.c_long(in_features),
            ctypes.c_void_p(self._packed.data_ptr()),
        )
        self._bias, self._scale, self._input_factor = map(_floats, (weights.bias, weights.scale, weights.input_factor))
        self._sum = None if weights.scale is None else weight.sum(1, dtype=torch.int32)
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
        y = x.new_empty((len(x), self._out_features), dtype=out_dtype)
        status = self._apply(
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
        _check(status)
        return y


class NativeAttention:
    """Fulfils `Attention` in float32 or bfloat16."""

    def __init__(self, position_bias: PositionBias, head_dim: int, dtype: torch.dtype) -> None:
        """Raises ValueError unless `attends`."""
        if not attends(dtype, head_dim, position_bias.reach + 1):
            raise ValueError(f"attention does not run in {dtype} with heads of {head_dim} here")
        self._attend = _function(dtype, "attention")
        self._dtype = dtype
        self._bias = position_bias.by_offset.float().contiguous()
        self._struct = _AttentionStruct(position_bias.num_heads, head_dim, self._bias.data_ptr(), position_bias.reach)

    def host_arrays(self, _lengths: Sequence[int]) -> list[NDArray[Any]]:
        return []

    def num_cells(self, lengths: Sequence[int]) -> int:
        return sum([length * length for length in lengths])

    def prepare(self, lengths: Sequence[int], _arrays: Sequence[Tensor]) -> Attend:
        sizes = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes

        def attend(qkv: Tensor) -> Tensor:
            qkv = qkv.to(self._dtype).contiguous()
            context = qkv.new_empty((len(qkv), qkv.shape[1] // 3))
            status = self._attend(
                ctypes.byref(self._struct),
                ctypes.c_void_p(qkv.data_ptr()),
                ctypes.c_void_p(starts.ctypes.data),
                ctypes.c_void_p(sizes.ctypes.data),
                ctypes.c_long(len(sizes)),
                ctypes.c_void_p(context.data_ptr()),
                ctypes.c_int(torch.get_num_threads()),
            )
            _check(status)
            return context

        return attend
