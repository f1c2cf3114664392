"""A few pages over HTTP for probes and scrapes: GET and HEAD of fixed paths, one answer a connection.

On a thread of its own, in one event loop: a client that is slow, or sends nothing, holds up nobody, and is cut off
after CLIENT_TIMEOUT_S. Knows HTTP; what the pages say is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from embedq.producer.errors import ConfigurationError

#: Seconds from a connection's beginning to its end.
CLIENT_TIMEOUT_S = 10.0
#: Bytes of a request's line and headers.
MAX_HEAD_BYTES = 8192
#: Connections at a time. One more ends the oldest, which had the most time.
MAX_CONNECTIONS = 64
#: Seconds that `close` waits for its thread.
CLOSE_TIMEOUT_S = 2.0
TEXT = "text/plain; charset=utf-8"

logger = logging.getLogger("embedq.http")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: str = TEXT


@dataclass(frozen=True, slots=True)
class Page:
    #: given the request's Accept header
    answer: Callable[[str], Answer]
    #: whether it may take long: then it is made on another thread, one at a time
    is_slow: bool = False


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    accept: str


class HttpEndpoints:
    """Serves `pages` by their paths from `start` to `close`. Attributes: host, port (the one chosen, where 0 was asked
    for).
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Page], listening: socket.socket | None = None) -> None:
        """Takes the port, or a socket that listens already. Raises ConfigurationError if the port cannot be had."""
        self._pages = dict(pages)
        self._socket = listening or _listen(host, port)
        self._socket.setblocking(False)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="embedq-http", daemon=True)
        #: of each connection, the oldest first
        self._tasks: dict[asyncio.Task[Any], None] = {}
        #: a slow page, though perhaps nobody waits for it any more
        self._is_making = False
        self._rendering = asyncio.Lock()
        self._is_serving = threading.Event()

    def start(self) -> None:
        self._thread.start()
        self._is_serving.wait()

    def close(self) -> None:
        """Cuts off whoever is still connected."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT_S)
        else:
            self._loop.close()
        self._socket.close()

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(
            asyncio.start_server(self._serve, sock=self._socket, limit=MAX_HEAD_BYTES, backlog=MAX_CONNECTIONS)
        )
        loop.call_soon(self._is_serving.set)
        try:
            loop.run_forever()
        finally:
            server.close()
            loop.run_until_complete(self._cut_off())
            loop.close()

    async def _cut_off(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs this as one
        if len(self._tasks) >= MAX_CONNECTIONS:
            next(iter(self._tasks)).cancel()
        self._tasks[task] = None
        # Nothing stays behind in a buffer that nobody reads.
        writer.transport.set_write_buffer_limits(0)
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                await self._converse(reader, writer)
            writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.pop(task, None)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = _read(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError:
            request, answer = None, _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            answer = await self._answer(request)
        writer.write(_response(answer, with_body=request is None or request.method != "HEAD"))
        await writer.drain()

    async def _answer(self, request: _Request | None) -> Answer:
        if request is None:
            return _plain(HTTPStatus.BAD_REQUEST)
        if request.method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED)
        page = self._pages.get(request.path)
        if page is None:
            return _plain(HTTPStatus.NOT_FOUND)
        try:
            return await self._render(page, request.accept) if page.is_slow else page.answer(request.accept)
        except Exception:
            logger.exception("%s could not be made", request.path)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)

    async def _render(self, page: Page, accept: str) -> Answer:
        async with self._rendering:
            if self._is_making:
                # The one before was given up, and still hangs.
                return _plain(HTTPStatus.SERVICE_UNAVAILABLE)
            self._is_making = True
            made: asyncio.Future[Answer] = self._loop.create_future()
            threading.Thread(target=self._make, args=(page, accept, made), name="embedq-http-page", daemon=True).start()
            return await made

    def _make(self, page: Page, accept: str, made: asyncio.Future[Answer]) -> None:
        answer, error = None, None
        try:
            answer = page.answer(accept)
        except Exception as err:
            error = err
        # Closed meanwhile: nobody waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell, made, answer, error)

    def _tell(self, made: asyncio.Future[Answer], answer: Answer | None, error: Exception | None) -> None:
        self._is_making = False
        if made.done():  # given up
            return
        if error is not None:
            made.set_exception(error)
        elif answer is not None:
            made.set_result(answer)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listening = socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except socket.gaierror as err:
        raise ConfigurationError(f"cannot listen on {host}: {err.strerror}") from err
    except (OSError, OverflowError, UnicodeError) as err:
        # Python's own text names the address once more.
        reason = os.strerror(err.errno) if isinstance(err, OSError) and err.errno else str(err)
        raise ConfigurationError(f"cannot listen on {host} port {port}: {reason}; choose another") from err
    return listening


def inherited(descriptor: int) -> socket.socket:
    """A socket that another process has made to listen. Raises ConfigurationError where it is none."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError as err:
        raise ConfigurationError(f"file descriptor {descriptor} is no socket") from err
    if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        found.detach()
        raise ConfigurationError(f"file descriptor {descriptor} is no socket that listens")
    return found


def _read(head: bytes) -> _Request | None:
    """None for what is no HTTP request."""
    line, *headers = head.decode("latin-1").split("\r\n")
    parts = line.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        return None
    accept = ""
    for header in headers:
        name, _, value = header.partition(":")
        if name.strip().lower() == "accept":
            accept = value.strip()
    return _Request(parts[0], parts[1].partition("?")[0], accept)


def _plain(status: HTTPStatus) -> Answer:
    return Answer(status, f"{status.phrase.lower()}\n".encode())


def _response(answer: Answer, *, with_body: bool) -> bytes:
    status = HTTPStatus(answer.status)
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    return "\r\n".join([*lines, "", ""]).encode() + (answer.body if with_body else b"")
