"""A way to Redis that breaks at a chosen moment: after a request was carried out, and before its answer is known."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

CHUNK_BYTES = 256 * 1024
#: Seconds of silence after which the server has said all that it had to say.
QUIET_S = 0.1
#: Bytes kept of what was sent, for a word that two chunks share.
TAIL_BYTES = 64


class CuttingProxy:
    """A context manager: connect to `port`. `target` is a server's URL, which may change for those who come later."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.num_cuts = 0
        self._cut_after: bytes | None = None
        self._before_answer: tuple[bytes, Callable[[], object]] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: set[socket.socket] = {self._listener}
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut_after(self, word: bytes) -> None:
        """The next request with this word is carried out, its answer lost and the connection gone."""
        self._cut_after = word

    def before_answer(self, word: bytes, action: Callable[[], object]) -> None:
        """Does something once the next request with this word was carried out, before the client knows."""
        self._before_answer = (word, action)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, _connected(self.target) as server, contextlib.suppress(OSError, ValueError):
            self._sockets |= {client, server}
            tail, action, is_cut = b"", None, False
            while True:
                ready, _, _ = select.select([client, server], [], [], QUIET_S if is_cut else None)
                if is_cut and not ready:
                    self.num_cuts += 1
                    break
                if client in ready:
                    data = client.recv(CHUNK_BYTES)
                    if not data:
                        break
                    seen, tail = tail + data, (tail + data)[-TAIL_BYTES:]
                    if self._cut_after is not None and self._cut_after in seen:
                        self._cut_after, is_cut = None, True
                    if self._before_answer is not None and self._before_answer[0] in seen:
                        (_, action), self._before_answer = self._before_answer, None
                    server.sendall(data)
                if server in ready:
                    data = server.recv(CHUNK_BYTES)
                    if not data:
                        break
                    if action is not None:
                        action()
                        action = None
                    if not is_cut:
                        client.sendall(data)
        self._sockets -= {client, server}


def _connected(url: str) -> socket.socket:
    if url.startswith("unix://"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(url.removeprefix("unix://"))
        return made
    host, _, port = url.removeprefix("redis://").partition("/")[0].partition(":")
    return socket.create_connection((host, int(port)))
