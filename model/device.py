"""Where tensors live: the one module that knows devices.

Knows no model and no thread settings: those are the process's own business.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from embedq.model.errors import DeviceError

#: Tokens of one micro-batch. On a CPU the best throughput lies at 1024 to 2048: above, activations leave the
#: cache. A GPU wants enough rows to fill all its cores.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384, "mps": 4096}
#: Elements of the attention scores (sequences, heads, L, L) computed at once, unless one sequence alone has more.
MAX_SCORES = {"cpu": 1 << 21, "cuda": 1 << 27, "mps": 1 << 24}


def resolve_device(device: str) -> torch.device:
    """`auto` (cuda, then mps, then cpu), `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises DeviceError, saying what is available.
    """
    available = available_devices()
    if device == "auto":
        return torch.device(available[0])
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise DeviceError(f"unknown device {device!r}: use auto, {', '.join(available)}")
    name = "cuda:0" if device == "cuda" else device
    if name not in available:
        raise DeviceError(f"device {device!r} is not available here: use auto, {', '.join(available)}")
    return torch.device(name)


def available_devices() -> list[str]:
    """The fastest first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def for_segments(hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Both where `torch.segment_reduce` exists: their own device, but the CPU for mps."""
    device = torch.device("cpu") if hidden.device.type == "mps" else hidden.device
    return hidden.to(device), lengths.to(device)
