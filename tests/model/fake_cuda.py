"""A GPU without one: tensors that say `cuda:0` and hold no data, and what watches the operators that touch them.

torch's FakeTensorMode runs every operator's rules for shape, dtype and device; a CPU build lacks only the guard that
some of Python's own methods ask for, so `_WithoutGuard` calls the operator below them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedq.model import mpnet
from embedq.model.backend import choose_backend
from embedq.model.config import MPNetConfig
from embedq.model.mpnet import MPNet
from embedq.model.weights import Checkpoint

CUDA = torch.device("cuda:0")
#: Operators at which the host waits for a GPU, whatever they are given.
SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class _WithoutGuard(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and args[0].device.type == "cuda":
            return _get_item(args[0], args[1])
        if func in (Tensor.contiguous, Tensor.copy_):
            return getattr(torch.ops.aten, func.__name__)(*args, **kwargs)
        return func(*args, **kwargs)


def _get_item(tensor: Tensor, index: Any) -> Tensor:
    """What basic indexing and one tensor as the index come to in operators."""
    if isinstance(index, Tensor):
        return torch.ops.aten.index(tensor, [index])
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if part is None:
            tensor = torch.ops.aten.unsqueeze(tensor, dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        else:
            raise NotImplementedError(f"index {part!r}")
    return tensor


@dataclass(frozen=True)
class Spec:
    """A tensor without what would keep it alive."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operator that touched the GPU."""

    name: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    non_blocking: bool

    @property
    def synchronizes(self) -> bool:
        """Whether the host waits: by the operator's nature, or for a copy from one side to the other."""
        if self.name.split(".")[0] in SYNCHRONIZING:
            return True
        crosses = len({spec.device for spec in (*self.inputs, *self.outputs)}) > 1
        return crosses and not self.non_blocking


class Watch(TorchDispatchMode):
    """All operators on GPU tensors, and the bytes that were live on the GPU at most since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.peak_bytes = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if any(tensor.device == CUDA for tensor in (*inputs, *outputs)):
            non_blocking = kwargs.get("non_blocking", func is torch.ops.aten.copy_.default and args[2:] == (True,))
            self.ops.append(Op(func.__name__, _specs(inputs), _specs(outputs), bool(non_blocking)))
            self._account(outputs)
        return result

    def _account(self, outputs: Sequence[Tensor]) -> None:
        for tensor in outputs:
            if tensor.device == CUDA:
                storage = tensor.untyped_storage()
                self._live.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())

    def live_bytes(self) -> int:
        self._live = {ref: num_bytes for ref, num_bytes in self._live.items() if not ref.expired()}
        return sum(self._live.values())

    def reset(self) -> None:
        self.ops.clear()
        self.peak_bytes = self.live_bytes()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _specs(tensors: Sequence[Tensor]) -> tuple[Spec, ...]:
    return tuple(Spec(str(tensor.device), tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


class FinishedEvent:
    """`torch.cuda.Event` of a device that is never behind."""

    def __init__(self, blocking: bool = False) -> None: ...

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def fake_gpu(*, total_bytes: int = 16 << 30) -> Iterator[Watch]:
    """While the block runs `cuda:0` exists, for tensors made inside. `total_bytes` of memory, all of it free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", FinishedEvent)
        patch.setattr(torch.cuda, "current_stream", lambda _device: None)
        patch.setattr(torch.cuda, "device", lambda _device: nullcontext())
        patch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
        patch.setattr(torch.cuda, "mem_get_info", lambda _device: (total_bytes, total_bytes))
        patch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
        patch.setattr(torch.cuda, "synchronize", lambda _device: None)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(Checkpoint, "read", _read_nothing)
        # What holds no data cannot be looked at.
        patch.setattr(mpnet, "is_finite", lambda _tensor: True)
        with FakeTensorMode(allow_non_fake_inputs=True), _WithoutGuard(), Watch() as watch:
            yield watch


def _read_nothing(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: torch.empty(checkpoint._shapes[name]) for name in names}


class EmptyCheckpoint:
    """Weights of any shape that take no memory."""

    folder = Path("fake")
    is_quantized = False

    def __init__(self, config: MPNetConfig) -> None:
        self._shapes = mpnet.tensor_shapes(config)

    def is_int8(self, _name: str) -> bool:
        return False

    def check(self, expected: object) -> None: ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: torch.empty(self._shapes[name]) for name in names}


def empty_model(config: MPNetConfig, dtype: torch.dtype, max_scores: int) -> MPNet:
    """To be made and run under `fake_gpu`."""
    checkpoint = cast("Checkpoint", EmptyCheckpoint(config))
    return MPNet(config, checkpoint, choose_backend(CUDA, dtype, config, max_scores=max_scores))
