"""The network between clients and Redis, which can be made bad: `python -m tests.chaos.proxy TARGET_PORT PORT`.

Connections can be cut, slowed down and held up, and a request or its reply can be lost with the connection: a reply
only after the server gave it, so that whatever was asked has been done; of a torn request the first half arrives.
Told what to do by lines of JSON on stdin; tells what it did in lines on stdout. Knows TCP chunks and the bytes that
mark a request, no Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

HOST = "127.0.0.1"
CHUNK_BYTES = 256 * 1024
BACKLOG = 512


@dataclass(slots=True)
class Loss:
    """The next requests that hold `marker`, halves of them, or their replies, are lost until a moment."""

    what: Literal["lose_request", "tear", "lose_reply"]
    marker: bytes
    times: int
    until: float


@dataclass(eq=False, slots=True)
class Connection:
    to_client: asyncio.StreamWriter
    to_server: asyncio.StreamWriter
    #: its next reply is lost
    is_doomed: bool = False

    def cut(self) -> None:
        """At once and without a farewell; what was not sent is gone."""
        self.to_client.transport.abort()
        self.to_server.transport.abort()


class Proxy:
    """For one event loop."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._connections: set[Connection] = set()
        self._losses: list[Loss] = []
        self._delay_s = 0.0
        self._delayed_until = self._stalled_until = 0.0

    async def run(self, port: int) -> None:
        """Until stdin ends. Prints its port, then for each thing that it did a line of JSON."""
        server = await asyncio.start_server(self._serve, HOST, port, limit=CHUNK_BYTES, backlog=BACKLOG)
        print(server.sockets[0].getsockname()[1], flush=True)
        orders = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        while line := await orders.readline():
            self.order(json.loads(line))

    def order(self, order: dict[str, Any]) -> None:
        """what: `cut`; `delay` and `stall` with for_s (and delay_s); the losses with for_s, marker and times."""
        now = asyncio.get_running_loop().time()
        match order["what"]:
            case "cut":
                for connection in list(self._connections):
                    connection.cut()
                _tell("cut", connections=len(self._connections))
            case "delay":
                self._delay_s, self._delayed_until = order["delay_s"], now + order["for_s"]
            case "stall":
                self._stalled_until = now + order["for_s"]
            case what:
                marker = order["marker"].encode()
                self._losses.append(Loss(what, marker, order["times"], now + order["for_s"]))

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_connection(HOST, self._target_port, limit=CHUNK_BYTES)
        except OSError:
            to_client.transport.abort()
            return
        connection = Connection(to_client, to_server)
        self._connections.add(connection)
        ways = [
            asyncio.create_task(self._forward_requests(client, connection)),
            asyncio.create_task(self._forward_replies(server, connection)),
        ]
        try:
            # Whichever side ends first, the other is of no use.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            self._connections.discard(connection)
            connection.to_client.close()
            connection.to_server.close()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _forward_requests(self, client: asyncio.StreamReader, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            while data := await client.read(CHUNK_BYTES):
                await self._linger()
                loss = self._loss_of(data)
                if loss is not None and loss.what == "lose_request":
                    _tell("lost_request")
                    connection.cut()
                    return
                if loss is not None and loss.what == "tear":
                    _tell("torn_request")
                    connection.to_server.write(data[: len(data) // 2])
                    await connection.to_server.drain()
                    connection.cut()
                    return
                connection.is_doomed = connection.is_doomed or loss is not None
                connection.to_server.write(data)
                await connection.to_server.drain()

    async def _forward_replies(self, server: asyncio.StreamReader, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(CHUNK_BYTES):
                if connection.is_doomed:
                    _tell("lost_reply")
                    connection.cut()
                    return
                await self._linger()
                connection.to_client.write(data)
                await connection.to_client.drain()

    async def _linger(self) -> None:
        now = asyncio.get_running_loop().time
        while (left_s := self._stalled_until - now()) > 0:
            await asyncio.sleep(left_s)
        if now() < self._delayed_until:
            await asyncio.sleep(self._delay_s)

    def _loss_of(self, data: bytes) -> Loss | None:
        now = asyncio.get_running_loop().time()
        self._losses = [loss for loss in self._losses if loss.times > 0 and now < loss.until]
        for loss in self._losses:
            if loss.marker in data:
                loss.times -= 1
                return loss
        return None


def _tell(what: str, **more: Any) -> None:
    print(json.dumps({"did": what, **more}), flush=True)


if __name__ == "__main__":
    asyncio.run(Proxy(int(sys.argv[1])).run(int(sys.argv[2])))
