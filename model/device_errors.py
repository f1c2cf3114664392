"""What a device's failures come to: encode less at a time, start a new process, or neither.

Knows the numbers and words of CUDA, HIP, torch and the host's allocators. A message made here quotes none of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embedq.model.errors import DeviceLostError, ModelError, OutOfMemoryError
from embedq.model.runtime import Runtime

#: A handle of cuBLAS takes memory too, and where there is none it is only said not to be there.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate",
    re.IGNORECASE,
)
_DEVICE_ERROR = re.compile(r"\b(?:CUDA|HIP)(?: driver)? error: ")

#: cudaError_t of <driver_types.h> after which, as it says, "the process must be terminated and relaunched", or the
#: device is gone; in the words of cudaGetErrorString, for versions of torch that give no number. HIP has the same.
LOST = {
    46: "all CUDA-capable devices are busy or unavailable",
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "an error of the hardware that was contained",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    709: "context is destroyed",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
    806: "the remote procedural call between the MPS server and the MPS client failed",
    810: "the MPS client was terminated by the server",
    999: "unknown error",
}


def is_out_of_memory(err: Exception) -> bool:
    """Whether less work at a time may help."""
    if isinstance(err, RuntimeError):
        return isinstance(err, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(err)) is not None
    return isinstance(err, MemoryError)


def is_device_lost(err: Exception) -> bool:
    """Whether nothing on the device will work any more in this process."""
    return _lost_reason(err) is not None


def _lost_reason(err: Exception) -> str | None:
    """Why the device is lost, in words of LOST; None if it isn't."""
    said = str(err)
    if not isinstance(err, RuntimeError) or not _DEVICE_ERROR.search(said):
        return None
    # torch.AcceleratorError has the number.
    reason = LOST.get(getattr(err, "error_code", 0))
    return reason or next((words for words in LOST.values() if words in said), None)


@contextmanager
def device_errors(runtime: Runtime) -> Iterator[None]:
    """What the block raises for want of memory, or because the device is lost, becomes a ModelError that says so.

    Raises OutOfMemoryError and DeviceLostError.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as err:
        if reason := _lost_reason(err) or _pending_reason(runtime):
            raise DeviceLostError(f"{runtime.device} is lost to this process ({reason}): start a new one") from err
        if is_out_of_memory(err):
            raise OutOfMemoryError(f"{runtime.device} is out of memory: encode fewer tokens at a time") from err
        raise


def _pending_reason(runtime: Runtime) -> str | None:
    """As `_lost_reason`, asked of the device: a library on it may only say that it failed."""
    try:
        with runtime.scope():
            runtime.synchronize()
    except RuntimeError as err:
        return _lost_reason(err)
    return None
