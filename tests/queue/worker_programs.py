"""Ways to run `embedq` in a test: with Python code before it, and as process 1 of a container."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import until


def program(folder: Path, code: str) -> list[str]:
    """`embedq` as a script that runs `code` first."""
    script = folder / "program.py"
    script.write_text(f"{code}\nfrom embedq.worker.cli import main\nmain()\n")
    return [sys.executable, str(script)]


def is_isolation_permitted() -> bool:
    shown = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True)
    return shown.returncode == 0


def isolated(command: Sequence[str]) -> list[str]:
    """The same as process 1 of a namespace, as in a container; where that is not permitted as the head of a session."""
    if is_isolation_permitted():
        return ["unshare", "--pid", "--fork", "--kill-child", *command]
    return ["setsid", "--wait", *command]


def isolated_pid(outer: int) -> int:
    """The number, seen from here, of what `isolated` runs as the child of a process."""
    children = Path(f"/proc/{outer}/task/{outer}/children")
    until(lambda: children.read_text().split())
    return int(children.read_text().split()[0])


def signal_isolated(outer: int, number: int) -> None:
    os.kill(isolated_pid(outer), number)
