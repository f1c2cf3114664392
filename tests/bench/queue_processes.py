"""The systems' processes: a producer that is asked to enqueue, and a worker that is watched from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedq.worker import processes
from tests.bench.queue_contenders import Contender

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("queue_peers") / "process.py"
#: Characters of a failed process's log that are shown.
LOG_TAIL = 2000
STOP_TIMEOUT_S = 10.0
#: Linux' id of a process's CPU clock: the process id inverted, and the kind of clock (CPUCLOCK_SCHED).
_CPU_CLOCK_SHIFT, _CPU_CLOCK_KIND = 3, 2
#: Places in /proc/PID/stat, counted from behind the name, of what ended children took (user, system).
_STAT_CHILDREN = slice(13, 15)


class QueuePeerError(RuntimeError):
    """A system's process ended or got nowhere; the message has the end of its log."""


class Bench:
    """Where everything runs: the two environments and the folder of the logs."""

    def __init__(self, peers_python: Path, logs: Path) -> None:
        self._peers_python = peers_python
        self.logs = logs

    def command(self, contender: Contender, role: str, url: str) -> list[str]:
        python = sys.executable if contender.is_ours else str(self._peers_python)
        return [python, str(SCRIPT), contender.system, role, url]


class Producer:
    """Enqueues jobs only while a call waits for it."""

    def __init__(self, bench: Bench, contender: Contender, url: str) -> None:
        self._log = bench.logs / f"{contender.system}.produce.log"
        with self._log.open("w") as stderr:
            self._process = subprocess.Popen(
                bench.command(contender, "produce", url),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.versions: dict[str, str] = self._answer()["versions"]

    def enqueue(self, num_jobs: int, texts_per_job: int = 1, *, many: bool = False) -> float:
        """Seconds that it took; `many` by the system's call for many, one by one otherwise."""
        return float(self._ask(enqueue=num_jobs, texts_per_job=texts_per_job, many=many))

    def alone_s(self, number: int) -> list[float]:
        """Of so many jobs, one after the other with pauses, each from enqueueing to the result."""
        return list(self._ask(alone=number))

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return dict(json.loads(line))

    def _ended(self) -> QueuePeerError:
        self.close()
        return _failed("the producer ended", self._log)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class WorkerProcess:
    """A context manager: one worker, started with it and ended with it, whatever it has forked included."""

    def __init__(self, bench: Bench, contender: Contender, url: str) -> None:
        self._contender = contender
        self._log = bench.logs / f"{contender.system}.work.log"
        self._command = bench.command(contender, "work", url)

    def __enter__(self) -> Self:
        self._log.unlink(missing_ok=True)
        self._process = processes.start(self._command, self._log)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and self._contender.has_last_words:
                self._process.send_signal(signal.SIGTERM)
                self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def cpu_s(self) -> float:
        """What it and its ended children have computed so far. Linux alone tells."""
        own = time.clock_gettime((~self._process.pid << _CPU_CLOCK_SHIFT) | _CPU_CLOCK_KIND)
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return own + sum(map(int, stat[_STAT_CHILDREN])) / os.sysconf("SC_CLK_TCK")

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def check(self) -> None:
        """Raises QueuePeerError if it has ended by itself."""
        if self._process.poll() is not None:
            raise _failed(f"{self._contender.name} ended with status {self._process.returncode}", self._log)

    def stuck(self, what: str) -> QueuePeerError:
        return _failed(f"{self._contender.name}: {what}", self._log)


def _failed(what: str, log: Path) -> QueuePeerError:
    return QueuePeerError(f"{what}; its log ends with\n{log.read_text(errors='replace')[-LOG_TAIL:]}")
