"""A Redis that is reached by TLS alone, and asks for a certificate of whoever connects.

Either a server that speaks TLS itself, or any server behind a proxy of ours that does: not every binary was built so.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trustme

from embedq.worker.redis_server import CONFIGURATION, RedisServer, free_port
from tests.conftest import redis_binaries

CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files, made for one test: `ca` has signed the server's and the client's; `other_ca` nothing."""

    ca: Path
    other_ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    @classmethod
    def make(cls, folder: Path, server_name: str = "127.0.0.1") -> Certificates:
        folder.mkdir(exist_ok=True)
        made = cls(*(folder / f"{name}.pem" for name in cls.__dataclass_fields__))
        ca = trustme.CA()
        server, client = ca.issue_cert(server_name), ca.issue_cert("client@embedq.test")
        ca.cert_pem.write_to_path(made.ca)
        trustme.CA().cert_pem.write_to_path(made.other_ca)
        server.cert_chain_pems[0].write_to_path(made.server)
        server.private_key_pem.write_to_path(made.server_key)
        client.cert_chain_pems[0].write_to_path(made.client)
        client.private_key_pem.write_to_path(made.client_key)
        return made

    def options(self) -> str:
        """Of a URL, for a client that does everything right."""
        return f"ssl_ca_certs={self.ca}&ssl_certfile={self.client}&ssl_keyfile={self.client_key}"

    def directives(self, port: int) -> str:
        """For the configuration of a server that speaks TLS on this port."""
        return (
            f"\ntls-port {port}\ntls-auth-clients yes\ntls-ca-cert-file {self.ca}\n"
            f"tls-cert-file {self.server}\ntls-key-file {self.server_key}\n"
        )


def tls_binaries() -> list[str]:
    return [binary for binary in redis_binaries() if _speaks_tls(binary)]


def _speaks_tls(binary: str) -> bool:
    """One that does not know the option says so and ends; one that does misses a file."""
    shown = subprocess.run([binary, "--port", "0", "--tls-port", "1"], capture_output=True, text=True, timeout=20)
    return "tls-port" not in shown.stdout + shown.stderr


class TLSRedis:
    """A context manager. `port` is TLS', `plain_url` is for the test itself. Without a binary a proxy speaks TLS."""

    def __init__(self, folder: Path, certificates: Certificates, binary: str | None) -> None:
        self.port = free_port()
        configuration = Path(shutil.copy(CONFIGURATION, folder))
        if binary is not None:
            with configuration.open("a") as lines:
                lines.write(certificates.directives(self.port))
        self._server = RedisServer(folder, port=0, binary=binary or redis_binaries()[0], configuration=configuration)
        self._proxy = None if binary is not None else TLSProxy(self.port, certificates, self._server)
        self._on_exit = contextlib.ExitStack()

    @property
    def plain_url(self) -> str:
        return self._server.url

    def __enter__(self) -> Self:
        self._on_exit.enter_context(self._server)
        if self._proxy is not None:
            self._on_exit.enter_context(self._proxy)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._on_exit.close()


class TLSProxy:
    """Ends TLS before a server on this machine, on a thread with an event loop of its own."""

    def __init__(self, port: int, certificates: Certificates, server: RedisServer) -> None:
        self._port = port
        self._server = server
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates.ca))
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_cert_chain(certificates.server, certificates.server_key)
        self._loop = asyncio.new_event_loop()
        # What goes wrong with a client's certificate is the client's to tell.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        self._is_up = threading.Event()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_up.wait(20)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(20)
        self._loop.close()

    async def _run(self) -> None:
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", self._port, ssl=self._context)
        self._is_up.set()
        await self._done.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        with contextlib.closing(to_client), contextlib.closing(to_server):
            forth = asyncio.ensure_future(_forward(client, to_server))
            back = asyncio.ensure_future(_forward(server, to_client))
            try:
                await asyncio.wait([forth, back], return_when=asyncio.FIRST_COMPLETED)
            finally:
                forth.cancel()
                back.cancel()
                await asyncio.gather(forth, back, return_exceptions=True)


async def _forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        target.write(data)
        await target.drain()
