"""A whole service on one machine: a private Redis and one worker process, started and stopped together.

`embedq up` and the demo share it. Knows processes and folders; the worker is the same command that a fleet runs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from embedq.producer import fleet
from embedq.producer.client import check_queue_name
from embedq.producer.connection import connect
from embedq.producer.errors import ConfigurationError, EmbedqError
from embedq.worker import processes
from embedq.worker.redis_server import RedisServer
from embedq.worker.settings import WorkerSettings
from embedq.worker.supervision.children import ChildPlan
from embedq.worker.supervision.invocation import worker_command, worker_environment
from embedq.worker.supervision.supervise import SupervisorSettings, make_supervisor, served

#: Seconds that a worker may take to load its model before it counts as stuck.
WORKER_START_TIMEOUT_S = 120.0
#: Seconds beyond the worker's own grace before it is killed.
EXTRA_GRACE_S = 5.0


class WorkerProcess:
    """`embedq worker` as a child process."""

    def __init__(self, url: str, queue: str, settings: WorkerSettings, log: Path) -> None:
        self.url = url
        self._queue = queue
        self._settings = settings
        self.log = log
        self._name = f"local.{os.getpid()}.{secrets.token_hex(4)}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once the worker takes jobs. Raises ConfigurationError with its last words if it ends instead."""
        command = worker_command([self._queue], self._settings, ["--name", self._name])
        self._process = processes.start(command, self.log, worker_environment(self.url))
        deadline = time.monotonic() + WORKER_START_TIMEOUT_S
        with connect(self.url) as client:
            while not any(worker.name == self._name for worker in fleet.look(client).workers):
                self.check()
                if time.monotonic() > deadline:
                    raise ConfigurationError(f"the worker was not ready within {WORKER_START_TIMEOUT_S:g} s")
                time.sleep(0.05)

    def check(self) -> None:
        """Raises ConfigurationError if the process has ended."""
        if self._process is not None and (status := self._process.poll()) is not None:
            said = processes.last_lines(self.log, 1).removeprefix("error: ")
            raise ConfigurationError(f"the worker ended with status {status}: {said}")

    def stop(self) -> None:
        if self._process is not None:
            processes.stop(self._process, self._settings.grace_s + EXTRA_GRACE_S)
            self._process = None


@contextmanager
def local_service(server: RedisServer, queue: str, settings: WorkerSettings) -> Iterator[WorkerProcess]:
    """Redis and a worker, both ready; both ended on leaving, the worker first."""
    with server:
        worker = WorkerProcess(server.url, queue, settings, server.folder / "worker.log")
        try:
            worker.start()
            yield worker
        finally:
            worker.stop()


def with_model_fetched(settings: WorkerSettings) -> WorkerSettings:
    """The settings with the model's folder in place of its name: fetched here, where a progress bar can be seen."""
    if settings.model.startswith("noop:"):
        return settings
    from embedq.model.sources import resolve_model
    from embedq.model.terminal import terminal_progress

    with terminal_progress() as progress:
        path = resolve_model(settings.model, revision=settings.revision, progress=progress).path
    return replace(settings, model=str(path))


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that what it started is stopped in order."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_local_service(
    port: int, data: Path | None, queue: str, settings: WorkerSettings, supervised: SupervisorSettings
) -> None:
    """`embedq up`: prints the URL, then watches until Ctrl-C, which is the way it is meant to end.

    A worker that ends is started again; one that cannot start, and a Redis that ends, end it all: ConfigurationError.
    """
    folder = data or default_data_folder()
    check_queue_name(queue)
    # Of the worker's life only what went wrong.
    logging.getLogger("embedq.supervisor").setLevel(logging.WARNING)
    with _locked(folder), sigterm_as_interrupt():
        settings = with_model_fetched(settings)
        server = RedisServer(folder, port=port, durable=True)
        click.echo(f"starting Redis in {folder} and a worker with {settings.model} ...", err=True)
        try:
            with server:
                _serve(server, queue, settings, supervised)
        except KeyboardInterrupt:
            # Before there was a supervisor, which takes the signals.
            pass
        click.echo(f"stopped; the data stays in {folder}", err=True)


def _serve(server: RedisServer, queue: str, settings: WorkerSettings, supervised: SupervisorSettings) -> None:
    log = server.folder / "worker.log"
    is_told = False

    def watch() -> None:
        nonlocal is_told
        server.check()
        if not is_told and any(slot.is_ready for slot in supervisor.slots):
            is_told = True
            click.echo(server.url)
            click.echo(_hints(server.url, queue, log), err=True)

    with log.open("ab", buffering=0) as output:
        plan = ChildPlan(
            url=server.url, queues=[queue], settings=settings, base_name=f"local.{os.getpid()}", write=output.write
        )
        supervisor = make_supervisor(plan, supervised, on_tick=watch)
        with served(supervisor, settings.metrics_host, settings.metrics_port):
            ending = supervisor.run()
    if ending.status and not supervisor.is_told_to_stop:
        raise ConfigurationError(f"the worker ended with status {ending.status}: {ending.words}")


def default_data_folder() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "embedq"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One service a folder: two servers would write into one file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "up.lock").open("w")
    except OSError as err:
        raise ConfigurationError(f"{folder} cannot be written ({err.strerror}); choose another with --data") from err
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise EmbedqError(f"another `embedq up` runs in {folder}; use it, or choose another --data") from err
        yield


def _hints(url: str, queue: str, log: Path) -> str:
    on_queue = "" if queue == "embed" else f" --queue {queue}"
    return (
        f"ready; Ctrl-C stops both. In another terminal:\n"
        f"  export EMBEDQ_URL={url}\n"
        f'  embedq embed "Where do otters sleep?"{on_queue}\n'
        f"  embedq info\n"
        f"worker log: {log}"
    )
