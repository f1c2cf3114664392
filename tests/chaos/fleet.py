"""Worker processes that are started again whenever they exit, as a supervisor does, and what they take of the machine.

Knows processes; knows nothing of jobs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from embedq.worker import processes

ROOT = Path(__file__).resolve().parents[2]
#: Seconds between two looks at the processes.
LOOK_EVERY_S = 0.05
STOP_TIMEOUT_S = 30.0
#: Lines of a worker's log that are shown when it is to blame.
LOG_LINES = 20


class Fleet:
    """A context manager: so many places, each with one worker at a time."""

    def __init__(self, num_workers: int, arguments: Sequence[str], logs: Path) -> None:
        """arguments: of Python."""
        self._command = [sys.executable, *arguments]
        self._logs = [logs / f"worker-{place}.log" for place in range(num_workers)]
        self._processes: list[subprocess.Popen[bytes]] = []
        #: exit statuses of workers that ended by themselves; below 0 the signal
        self.exits: Counter[int] = Counter()
        self._is_over = threading.Event()
        # The kernel ends children with the thread that started them, so it is this one that does, whoever waits.
        self._is_started = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="fleet")

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_started.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def log(self) -> str:
        """The ends of the logs."""
        return "\n".join(processes.last_lines(log, LOG_LINES) for log in self._logs)

    def _start(self, log: Path) -> subprocess.Popen[bytes]:
        return processes.start(self._command, log, {**os.environ, "PYTHONPATH": str(ROOT)})

    def _supervise(self) -> None:
        self._processes = [self._start(log) for log in self._logs]
        self._is_started.set()
        while not self._is_over.wait(LOOK_EVERY_S):
            for place, process in enumerate(self._processes):
                if process.poll() is not None:
                    self.exits[process.returncode] += 1
                    self._processes[place] = self._start(self._logs[place])
        for process in self._processes:
            processes.stop(process, STOP_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What Linux tells of a process."""

    rss_bytes: int
    num_fds: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        status = Path(f"/proc/{pid}/status").read_text()
        num_fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(_field(status, "VmRSS") * 1024, num_fds, _field(status, "Threads"))


def _field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+)", status, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"the process has no {name}: it has ended")
    return int(found[1])
