"""finish.lua in one transaction with streams that it takes over: the way of large results.

A script's arguments are copied three times on the server, and packing copies them on this side. A large result goes
past both: as a command of its own, whose bytes are sent from where they are. Knows the wire of Redis; not what is
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis
from redis.exceptions import NoScriptError

from embedq.producer.scripts import LOADS

#: Values from so many bytes on are sent as they are; below, a copy costs less than a call of the system.
SEND_APART_BYTES = 8 * 1024


class StagedScript:
    """A script called together with the streams it may rename. For several threads."""

    def __init__(self, client: redis.Redis, script: Any) -> None:
        self._pool: Any = client.connection_pool
        self._client: Any = client
        self._script = script

    def __call__(self, streams: Sequence[tuple[str, Sequence[Any]]], args: Sequence[Any]) -> Any:
        """streams: name, and the fields of its one entry. What the script has not renamed is gone afterwards.

        Raises redis-py's errors; nothing of the transaction was done then, or all of it.
        """
        for _ in range(LOADS):
            try:
                return self._send(streams, args)
            except NoScriptError:
                self._client.script_load(self._script.script)
        return self._send(streams, args)

    def _send(self, streams: Sequence[tuple[str, Sequence[Any]]], args: Sequence[Any]) -> Any:
        commands: list[Sequence[Any]] = [
            ("MULTI",),
            *(("XADD", name, "*", *fields) for name, fields in streams),
            ("EVALSHA", self._script.sha, 0, *args),
            # Those of jobs that are another's by now; or all, if the server lacks the script.
            ("DEL", *(name for name, _ in streams)),
            ("EXEC",),
        ]
        connection = self._pool.get_connection()
        try:
            connection.send_packed_command(list(_packed(commands)))
            replies = [connection.read_response() for _ in commands][-1]
        except BaseException:
            # Whatever is still to come on it belongs to nobody.
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies[len(streams)]


def _packed(commands: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """As Redis reads them (RESP), in pieces."""
    small: list[bytes] = []
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for value in command:
            plain = value if isinstance(value, bytes) else str(value).encode()
            small.append(b"$%d\r\n" % len(plain))
            if len(plain) >= SEND_APART_BYTES:
                yield b"".join(small)
                yield plain
                small = [b"\r\n"]
            else:
                small += (plain, b"\r\n")
    yield b"".join(small)
