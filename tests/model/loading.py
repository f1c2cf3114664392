"""What loading a model takes in memory, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CODE = """
import resource, sys, torch
from embedq.model import SentenceEncoder
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16), None)
before = peak()
SentenceEncoder.load(sys.argv[1], device="cpu", dtype=sys.argv[2]).encode("a")
print(peak() - before)
"""


def bytes_to_load(folder: Path, dtype: str) -> int:
    """The rise of the peak over loading and first use, after a tiny use of torch. On Linux alone."""
    command = [sys.executable, "-c", _CODE, str(folder), dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
