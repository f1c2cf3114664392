"""A master, a replica and Sentinels that watch them, on loopback ports of their own."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedq.producer.connection import connect
from embedq.worker.redis_server import CONFIGURATION, RedisServer, free_port
from tests.conftest import until

SERVICE = "otters"
#: Milliseconds of silence after which a master counts as dead, and between two attempts at a failover.
DOWN_AFTER_MS, FAILOVER_TIMEOUT_MS = 500, 2000


class ReplicatedRedis:
    """A context manager: `url` asks the Sentinels. `master` and `replica` are as they began."""

    def __init__(self, folder: Path, binary: str, num_sentinels: int = 1, down_after_ms: int = DOWN_AFTER_MS) -> None:
        self.master, self.replica = (self._server(folder / name, binary) for name in ("master", "replica"))
        self._folder = folder
        self._binary = binary
        self._down_after_ms = down_after_ms
        self.ports = [free_port() for _ in range(num_sentinels)]
        self._sentinels: list[subprocess.Popen[bytes]] = []
        self._on_exit = contextlib.ExitStack()

    @staticmethod
    def _server(folder: Path, binary: str) -> RedisServer:
        """With a configuration of its own: in a failover Sentinel has it rewritten."""
        folder.mkdir()
        return RedisServer(folder, port=0, binary=binary, configuration=shutil.copy(CONFIGURATION, folder))

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.ports)}/{SERVICE}/0"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._stop_sentinels)
            on_error.enter_context(self.master)
            on_error.enter_context(self.replica)
            with connect(self.master.url) as master, connect(self.replica.url) as replica:
                master.config_set("repl-diskless-sync-delay", 0)
                replica.replicaof("127.0.0.1", str(self.master.port))
            until(self.is_in_step)
            for port in self.ports:
                self._start_sentinel(port)
            until(lambda: all(self._is_ready(port) for port in self.ports))
            self._on_exit = on_error.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        # Asked to end they would wait for each other.
        self.master.kill()
        self.replica.kill()
        self._on_exit.close()

    def is_in_step(self) -> bool:
        """Whether the replica has all that the master has."""
        with connect(self.master.url) as master, connect(self.replica.url) as replica:
            told: Any = master.info("replication")
            heard: Any = replica.info("replication")
        return bool(
            heard.get("master_link_status") == "up" and told["master_repl_offset"] == heard["slave_repl_offset"]
        )

    def promoted(self) -> bool:
        """Whether the replica has become the master."""
        with connect(self.replica.url) as replica:
            told: Any = replica.info("replication")
            return bool(told["role"] == "master")

    def _start_sentinel(self, port: int) -> None:
        quorum = len(self.ports) // 2 + 1
        configuration = self._folder / f"sentinel-{port}.conf"
        configuration.write_text(
            f"port {port}\nbind 127.0.0.1\nprotected-mode no\ndir {self._folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.master.port} {quorum}\n"
            f"sentinel down-after-milliseconds {SERVICE} {self._down_after_ms}\n"
            f"sentinel failover-timeout {SERVICE} {FAILOVER_TIMEOUT_MS}\n"
        )
        with (self._folder / f"sentinel-{port}.log").open("wb") as log:
            command = [self._binary, str(configuration), "--sentinel"]
            self._sentinels.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def _is_ready(self, port: int) -> bool:
        """Whether it knows the replica and the other Sentinels: only then can it carry out a failover."""
        try:
            with connect(f"redis://127.0.0.1:{port}") as sentinel:
                told: Any = sentinel.execute_command("SENTINEL MASTER", SERVICE)
        except OSError:
            return False
        fields = told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=True))
        known = {_text(name): _text(value) for name, value in fields.items()}
        return int(known["num-slaves"]) == 1 and int(known["num-other-sentinels"]) == len(self.ports) - 1

    def _stop_sentinels(self) -> None:
        for process in self._sentinels:
            process.terminate()
        for process in self._sentinels:
            process.wait(20)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
