"""Which GPUs there are, without touching CUDA in this process: that takes memory on each, and seconds.

Knows device files and a child's answer, and nothing of tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from embedq.producer.errors import ConfigurationError

#: Seconds for importing torch from a cold disk and asking the driver.
TIMEOUT_S = 120.0
#: What drivers of GPUs put there: NVIDIA's, AMD's, and Windows' for its Linux.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_COUNT = """
import os
try:
    import torch
except ModuleNotFoundError:
    print(0, "torch is not installed: pip install 'embedq[worker]'")
else:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        print(0, f"torch {torch.__version__} is built without CUDA")
    elif torch.cuda.device_count() == 0 and chosen is not None:
        print(0, f"CUDA_VISIBLE_DEVICES={chosen} leaves none")
    else:
        print(torch.cuda.device_count(), "torch sees none; is the driver there, and has the container its GPUs?")
"""


def count_cuda_devices(python: str = sys.executable) -> int:
    """At least 1. CUDA_VISIBLE_DEVICES holds for it as for every child, whose cuda:0 is the first of those named there.

    Raises ConfigurationError, which says why there are none.
    """
    try:
        # This Python, with a program of our own.
        shown = subprocess.run([python, "-c", _COUNT], capture_output=True, text=True, timeout=TIMEOUT_S)  # nosec B603
    except subprocess.TimeoutExpired as err:
        raise ConfigurationError(f"the CUDA devices could not be counted within {TIMEOUT_S:g} s") from err
    number, _, why = shown.stdout.strip().partition(" ")
    if shown.returncode != 0 or not number.isdecimal():
        said = shown.stderr.strip().splitlines()
        raise ConfigurationError(f"the CUDA devices could not be counted: {said[-1] if said else shown.returncode}")
    if number == "0":
        raise ConfigurationError(f"there is no CUDA device: {why}")
    return int(number)


def may_have_gpu() -> bool:
    """False where the device `auto` is the CPU for certain."""
    if sys.platform == "darwin":
        return True
    return any(Path(name).exists() for name in _DEVICE_FILES) and os.environ.get("CUDA_VISIBLE_DEVICES") not in (
        "",
        "-1",
    )
