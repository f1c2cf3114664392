"""`python -m tests.bench.run`: all benchmarks, with the machine and the versions they ran on.

Figures of one run compare with each other alone; two runs on a busy machine do not.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

PACKAGES = ("redis", "rq", "torch", "tokenizers", "transformers", "sentence-transformers")
PARTS = ("queue_bench", "encoder_bench")
IMPORTS = 9


def main() -> None:
    console = Console()
    console.print(f"{platform.platform()}, {_cpu()}, Python {platform.python_version()}")
    console.print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    console.print(f"import embedq.producer: {_import_s('embedq.producer') * 1000:.0f} ms beyond an empty interpreter")
    for part in PARTS:
        # A process each: workers install signal handlers, and torch its threads.
        subprocess.run([sys.executable, "-m", f"tests.bench.{part}"], check=True)


def _import_s(module: str) -> float:
    """Median of fresh interpreters, less that of interpreters which import nothing."""

    def once(code: str) -> float:
        began_at = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began_at

    pairs = [(once(f"import {module}"), once("pass")) for _ in range(IMPORTS)]
    return statistics.median(full for full, _ in pairs) - statistics.median(empty for _, empty in pairs)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{sum(line.startswith('processor') for line in lines)} x {name}"


if __name__ == "__main__":
    main()
