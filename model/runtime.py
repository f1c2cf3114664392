"""How data reaches a device and comes back, what memory is left there and how exact its products are.

`device` chooses a device; what a GPU wants while it runs is known here alone: pinned buffers, events, its own
current device, TF32. Knows no model: arrays in, tensors out.

Copies share the stream of the computations. That keeps everything in order without further events, and memory may
be reused as soon as Python lets go of a tensor; a stream of their own would have to win more than that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
#: Waits for a copy and gives it, once.
Read = Callable[[], Array]

#: Bytes to which arrays are aligned in a staging buffer: any element type may be viewed there.
ALIGNMENT_BYTES = 16
#: Staging buffers for uploads: the host fills one while the device copies from the other, so it prepares at most
#: two micro-batches ahead.
NUM_STAGING_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, in bytes."""

    #: what this process may still take: nobody's, or reserved by torch without being used
    free: int
    total: int
    #: held by torch in this process, used or not
    reserved: int
    #: held by its tensors
    allocated: int


class Runtime(Protocol):
    """One device. May be used from several threads."""

    device: torch.device

    def scope(self) -> AbstractContextManager[None]:
        """Around everything that is computed on the device, and around each call below."""

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays on the device, same shapes and types. They may be changed at once; nothing waits."""

    def download(self, tensor: Tensor) -> Read:
        """Begins a copy to the host; the tensor may be dropped at once. The call's result waits for it."""

    def memory(self) -> Memory | None:
        """None where the device shares the host's memory."""

    def synchronize(self) -> None:
        """Waits until all that was begun is done. Raises what went wrong on the way."""

    def release_cache(self) -> None:
        """Gives memory that torch holds without using it back to the device."""


class HostRuntime:
    """For cpu and mps, which compute in the host's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """On the cpu without a copy: the arrays must be left as they are."""
        return [torch.from_numpy(array).to(self.device) for array in arrays]

    def download(self, tensor: Tensor) -> Read:
        return lambda: tensor.cpu().numpy()

    def memory(self) -> Memory | None:
        return None

    def synchronize(self) -> None:
        if self.device.type == "mps":
            torch.mps.synchronize()

    def release_cache(self) -> None:
        if self.device.type == "mps":
            torch.mps.empty_cache()


class CudaRuntime:
    """For one GPU: both ways through pinned memory, without waiting for the device."""

    def __init__(self, device: torch.device, *, allow_tf32: bool = False) -> None:
        self.device = device
        self._allow_tf32 = allow_tf32
        #: oldest first; a deque's own operations are atomic, and who finds none left makes another
        self._for_uploads: deque[_PinnedBuffer] = deque(_PinnedBuffer() for _ in range(NUM_STAGING_BUFFERS))
        self._for_downloads: deque[_PinnedBuffer] = deque()

    @contextmanager
    def scope(self) -> Iterator[None]:
        # Pinned memory and events belong to the current device: without this, a worker on the second GPU would
        # also take some hundred MB of the first.
        with torch.cuda.device(self.device), _float32_products.held(allow_tf32=self._allow_tf32):
            yield

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """In one copy, from one buffer."""
        places, num_bytes = _lay_out(arrays)
        buffer = _take(self._for_uploads)
        staged = buffer.reserve(num_bytes)
        for array, place in zip(arrays, places, strict=True):
            staged[place].copy_(torch.from_numpy(array).reshape(-1).view(torch.uint8))
        placed = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        placed.copy_(staged, non_blocking=True)
        buffer.mark(self.device)
        self._for_uploads.append(buffer)
        return [
            placed[place].view(torch.from_numpy(array).dtype).view(array.shape)
            for array, place in zip(arrays, places, strict=True)
        ]

    def download(self, tensor: Tensor) -> Read:
        tensor = tensor.contiguous()
        buffer = _take(self._for_downloads)
        host = buffer.reserve(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor, non_blocking=True)
        buffer.mark(self.device)

        def read() -> Array:
            buffer.wait()
            array: Array = host.numpy().copy()
            self._for_downloads.append(buffer)
            return array

        return read

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        return Memory(free + reserved - allocated, total, reserved, allocated)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release_cache(self) -> None:
        torch.cuda.empty_cache()


def runtime_for(device: torch.device, *, allow_tf32: bool = False) -> Runtime:
    """`allow_tf32` matters on cuda only."""
    return CudaRuntime(device, allow_tf32=allow_tf32) if device.type == "cuda" else HostRuntime(device)


class _PinnedBuffer:
    """Host memory that the device copies from or to by itself, and the event after which it is done with it."""

    def __init__(self) -> None:
        # Waiting sleeps instead of spinning: other threads tokenise meanwhile.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._memory: Tensor | None = None

    def reserve(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8, once the last use is over."""
        self.wait()
        if self._memory is None or self._memory.numel() < num_bytes:
            self._memory = _pinned(1 << max(num_bytes - 1, 0).bit_length())
        return self._memory[:num_bytes]

    def mark(self, device: torch.device) -> None:
        """All that was asked of the device so far belongs to this use."""
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _take(buffers: deque[_PinnedBuffer]) -> _PinnedBuffer:
    try:
        return buffers.popleft()
    except IndexError:
        return _PinnedBuffer()


def _lay_out(arrays: Sequence[Array]) -> tuple[list[slice], int]:
    """Where each array lies in a buffer, and the buffer's bytes."""
    places: list[slice] = []
    end = 0
    for array in arrays:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = start + array.nbytes
        places.append(slice(start, end))
    return places, end


class _Float32Products:
    """cuBLAS' switch for TF32 (float32 products with 10 bits of mantissa), which is one for the whole process.

    Held while a block of ours runs, then put back to what the process had. Blocks run in several threads: full
    precision wins as long as one of them wants it. Kernels take the switch as it is when they are launched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_exact = self._num_tf32 = 0
        self._before = False

    @contextmanager
    def held(self, *, allow_tf32: bool) -> Iterator[None]:
        self._count(allow_tf32, 1)
        try:
            yield
        finally:
            self._count(allow_tf32, -1)

    def _count(self, allow_tf32: bool, change: int) -> None:
        with self._lock:
            if not self._num_exact and not self._num_tf32:
                self._before = _is_tf32()
            if allow_tf32:
                self._num_tf32 += change
            else:
                self._num_exact += change
            _set_tf32(not self._num_exact if self._num_exact or self._num_tf32 else self._before)


_float32_products = _Float32Products()


def _is_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _set_tf32(is_on: bool) -> None:
    if is_on == _is_tf32():
        return
    matmul = torch.backends.cuda.matmul
    # Mixing the two interfaces is an error in torch 2.9 and later, which know both.
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "tf32" if is_on else "ieee"
    else:
        matmul.allow_tf32 = is_on
