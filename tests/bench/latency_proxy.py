"""A network between client and server: TCP chunks pass on after a delay, in order, however many are on their way.

`python -m tests.bench.latency_proxy TARGET_PORT DELAY_S` is the proxy, a process of its own so that it shares no
interpreter with what is measured; `LatencyProxy` starts it and asks it. It prints its port, then a number of round
trips for each line on stdin, and ends with stdin. Knows TCP, no Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
CHUNK_BYTES = 256 * 1024
#: Connections that may wait to be accepted.
BACKLOG = 1024


class LatencyProxy:
    """A context manager: connect to `port` instead of to the target's."""

    def __init__(self, target_port: int, delay_s: float) -> None:
        """`delay_s` is of each direction: a round trip takes twice that longer."""
        self._command = [sys.executable, "-m", "tests.bench.latency_proxy", str(target_port), str(delay_s)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.port = self._told_number()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._process.terminate()
        self._process.communicate()

    def num_round_trips(self) -> int:
        """How often a client has sent something after it had heard the server, first words included, so far.

        What is sent in one go is one round trip, however many commands or bytes it is. All connections together.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        return self._told_number()

    def _told_number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


class _Proxy:
    def __init__(self, target_port: int, delay_s: float) -> None:
        self._target_port = target_port
        self._delay_s = delay_s
        self._num_round_trips = 0

    async def run(self) -> None:
        """Until stdin ends."""
        server = await asyncio.start_server(self._serve, HOST, 0, limit=CHUNK_BYTES, backlog=BACKLOG)
        print(server.sockets[0].getsockname()[1], flush=True)
        questions = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
        while await questions.readline():
            print(self._num_round_trips, flush=True)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """One connection, until both sides have said their last."""
        with contextlib.closing(to_client):
            try:
                server, to_server = await asyncio.open_connection(HOST, self._target_port, limit=CHUNK_BYTES)
            except OSError:
                return
            clients_turn = True

            def heard_client() -> None:
                nonlocal clients_turn
                self._num_round_trips += clients_turn
                clients_turn = False

            def told_client() -> None:
                nonlocal clients_turn
                clients_turn = True

            with contextlib.closing(to_server), contextlib.suppress(ExceptionGroup):
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._forward(client, to_server, on_heard=heard_client))
                    both.create_task(self._forward(server, to_client, on_told=told_client))

    async def _forward(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        on_heard: Callable[[], None] = lambda: None,
        on_told: Callable[[], None] = lambda: None,
    ) -> None:
        """One direction. Raises OSError where a side breaks off, which ends the other direction too."""
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()  # unbounded, like a long wire
        now = asyncio.get_running_loop().time

        async def hear() -> None:
            while True:
                data = await source.read(CHUNK_BYTES)
                on_heard()
                on_its_way.put_nowait((now() + self._delay_s, data))
                if not data:
                    return

        async def tell() -> None:
            while True:
                due_at, data = await on_its_way.get()
                if (left_s := due_at - now()) > 0:
                    await asyncio.sleep(left_s)
                if not data:
                    target.write_eof()
                    return
                on_told()
                target.write(data)
                await target.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(hear())
            both.create_task(tell())


def main() -> None:
    proxy = _Proxy(int(sys.argv[1]), float(sys.argv[2]))
    # epoll rounds what it waits up to whole milliseconds; select does not.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(proxy.run())


if __name__ == "__main__":
    main()
