"""A worker process as the supervisor sees it: started from settings, asked over the loopback, heard line by line.

Knows how a child is started; when, and what follows, is the slot's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from embedq.worker import processes
from embedq.worker.cores import Share, thread_variables
from embedq.worker.settings import WorkerSettings
from embedq.worker.supervision.invocation import EMBEDQ, worker_command, worker_environment
from embedq.worker.supervision.probe import LOOPBACK, ChildHealth, Probe
from embedq.worker.supervision.relay import LineRelay, labelled

#: Connections that wait for a child which is busy.
_BACKLOG = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildPlan:
    """What all children have in common. The settings' device is each child's own."""

    url: str
    queues: Sequence[str]
    settings: WorkerSettings
    #: options that are no settings
    arguments: Sequence[str] = ()
    #: of their names: BASE.INDEX.CHANCE
    base_name: str
    #: takes whole lines
    write: Callable[[bytes], object]
    program: Sequence[str] = EMBEDQ


class ChildProcess:
    """Fulfils `Process`."""

    def __init__(self, plan: ChildPlan, index: int, device: str, share: Share) -> None:
        """Raises OSError if the system starts no process."""
        # A name of its own each time: that of a process which was killed is taken until its registration expires.
        self.name = f"{plan.base_name}.{index}.{secrets.token_hex(2)}"
        with socket.create_server((LOOPBACK, 0), backlog=_BACKLOG) as listening, _confined_to(share.cpus):
            self.port = int(listening.getsockname()[1])
            settings = replace(plan.settings, device=device, threads=share.threads, metrics_fd=listening.fileno())
            own = ["--name", self.name, "--child-of", str(os.getpid())]
            self._process = processes.spawn(
                worker_command(plan.queues, settings, [*plan.arguments, *own], plan.program),
                {**worker_environment(plan.url), **thread_variables(share.threads)},
                pass_fds=[listening.fileno()],
            )
        assert self._process.stdout is not None  # a pipe
        self._relay = LineRelay(self._process.stdout, labelled(settings.log_format, index), plan.write)
        self._probe = Probe(self.port)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def health(self) -> ChildHealth:
        return self._probe.latest

    def last_words(self) -> str:
        return self._relay.last_line()

    def close(self) -> None:
        self._probe.close()
        self._relay.drain()


@contextlib.contextmanager
def _confined_to(cpus: frozenset[int] | None) -> Iterator[None]:
    """What this thread starts meanwhile runs on these CPUs alone, from its first instruction on."""
    if cpus is None or not sys.platform.startswith("linux"):
        yield
        return
    before = os.sched_getaffinity(0)
    # Taken from us meanwhile (a CPU that goes off line): the system places the child.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def write_to_stderr(line: bytes) -> None:
    """At once and as one, so that lines of several writers do not mix."""
    os.write(sys.stderr.fileno(), line)
