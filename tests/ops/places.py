"""Processes of a drill: started, told to stop, killed, stopped and continued; and what their health endpoints say.

Knows processes and their HTTP port; knows nothing of jobs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from embedq.worker import processes
from tests.ops.scrape import Metrics, get

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that anything may take on a busy machine before the drill gives up.
PATIENCE_S = 120.0
#: Seconds between SIGTERM and SIGKILL.
STOP_TIMEOUT_S = 40.0
#: Lines of a log that are shown when its process is to blame.
LOG_LINES = 20
LOOK_EVERY_S = 0.02


class Process:
    """One place; its process changes. A context manager that ends it.

    Attributes: name, log (of all its processes), pids (of each so far).
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, sources: Sequence[Path] = ()) -> None:
        """sources: folders in which its packages are looked for before this repository's."""
        self.name = name
        self.log = folder / f"{name}.log"
        self.pids: list[int] = []
        self._command = list(command)
        self._path = os.pathsep.join(map(str, (*sources, ROOT)))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.pids[-1]

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self._process = processes.start(self._command, self.log, {**os.environ, "PYTHONPATH": self._path})
        self.pids.append(self._process.pid)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int | None:
        """SIGTERM and the exit status; None where it was never started."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
        return processes.stop(self._process, STOP_TIMEOUT_S)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_lines(self) -> str:
        return f"{self.name}:\n{processes.last_lines(self.log, LOG_LINES)}"


class Place(Process):
    """A process that says when it is ready."""

    def is_ready(self) -> bool:
        raise NotImplementedError

    def await_ready(self) -> float:
        """Seconds until it is."""
        return until(self.is_ready, f"{self.name} is not ready", self.last_lines)

    def restart(self) -> Restart:
        """As a deploy does it: SIGTERM, its end, a new process, until that is ready."""
        self.signal(signal.SIGTERM)
        left_s = until(lambda: not self.is_running, f"{self.name} does not end", self.last_lines)
        status = self.stop()
        self.start()
        return Restart(self.name, status, left_s, self.await_ready())


@dataclass(frozen=True, slots=True)
class Restart:
    name: str
    status: int | None
    #: until the old process had ended, and from then until the new one was ready
    left_s: float
    ready_s: float


class Served(Place):
    """With health endpoints."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, port: int, *, ready_path: str = "/readyz"
    ) -> None:
        super().__init__(name, command, folder)
        self.port = port
        self._ready_path = ready_path

    def is_ready(self) -> bool:
        return get(self.port, self._ready_path).status == 200

    def is_live(self) -> bool:
        return get(self.port, "/livez").status == 200

    def metrics(self) -> Metrics:
        return Metrics.parse(get(self.port, "/metrics").body)


class Silent(Place):
    """A worker of a version that has no endpoints: its log says when it serves."""

    def start(self) -> None:
        self._log_before = self.log.stat().st_size if self.log.exists() else 0
        super().start()

    def is_ready(self) -> bool:
        return b" serves " in self.log.read_bytes()[self._log_before :]


def until(
    condition: Callable[[], object], complaint: str, tell: Callable[[], str] = str, timeout_s: float = PATIENCE_S
) -> float:
    """Waits for it; seconds that it took. Raises TimeoutError with the complaint and what `tell` says."""
    began_at = time.monotonic()
    while not condition():
        if time.monotonic() - began_at > timeout_s:
            raise TimeoutError(f"{complaint} after {timeout_s:g} s; {tell()}")
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - began_at
