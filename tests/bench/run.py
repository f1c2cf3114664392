"""`python -m tests.bench.run`: all benchmarks, with the machine and the versions they ran on.

Figures of one run compare with each other alone; two runs on a busy machine do not.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import torch
from rich.console import Console

from embedq.model.machine import describe_machine
from tests.bench import measure

PACKAGES = ("redis", "rq", "transformers", "sentence-transformers")
IMPORTS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS, help="of each part")
    rounds = parser.parse_args().rounds
    console = Console()
    console.print("\n".join(describe_machine(torch.device("cpu")).lines()))
    console.print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    console.print(f"import embedq.producer: {_import_s('embedq.producer') * 1000:.0f} ms beyond an empty interpreter")
    # A process each: redis-py keeps connections, and torch its threads.
    for part in ("queue_bench", "encoder_bench"):
        subprocess.run([sys.executable, "-m", f"tests.bench.{part}", "--rounds", str(rounds)], check=True)


def _import_s(module: str) -> float:
    """Median of fresh interpreters, less that of interpreters which import nothing."""

    def once(code: str) -> float:
        began_at = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began_at

    pairs = [(once(f"import {module}"), once("pass")) for _ in range(IMPORTS)]
    return statistics.median(full for full, _ in pairs) - statistics.median(empty for _, empty in pairs)


if __name__ == "__main__":
    main()
