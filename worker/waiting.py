"""Sleeping until a job comes, on any of several queues, or until somebody wakes the worker.

One `BLMOVE queue queue LEFT LEFT` per queue waits on the server: it returns once the list has a head and leaves
the head where it is, so nothing is ever between the queue and a lease. Knows sockets; takes no job.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Sequence
from typing import Any

import redis

from embedq.producer.connection import is_wrong_type

#: Seconds after which the server ends a wait by itself, and seconds beyond in which the answer must have come: so a
#: connection that died silently is noticed.
SERVER_TIMEOUT_S, ANSWER_S = 20, 5


class QueueWaiter:
    """Waits on dedicated connections; for one thread, except `wake`."""

    def __init__(self, client: redis.Redis, queue_keys: Sequence[str]) -> None:
        self._pool: Any = client.connection_pool
        self._queue_keys = list(queue_keys)
        #: connections on which a BLMOVE is under way, and since when
        self._waiting: dict[str, Any] = {}
        self._since_s: dict[str, float] = {}
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def wait(self, timeout_s: float) -> bool:
        """True once a queue may have a job; false on `wake` and after the timeout. Raises redis-py's errors."""
        try:
            return self._wait(timeout_s)
        except BaseException:
            self.forget()
            raise

    def wake(self) -> None:
        """Ends the wait under way, or the next one. Safe in a signal handler and from any thread."""
        # A full pipe wakes just as well, and after `close` nobody sleeps.
        with contextlib.suppress(OSError):
            os.write(self._wake_writer, b"w")

    def forget(self) -> None:
        """Begins anew with the next wait: whatever the connections were in the middle of, they are not used again."""
        for connection in self._waiting.values():
            connection.disconnect()
            self._pool.release(connection)
        self._waiting.clear()

    def close(self) -> None:
        self.forget()
        reader, writer = self._wake_reader, self._wake_writer
        # A signal may still come, when the numbers belong to other files.
        self._wake_reader = self._wake_writer = -1
        os.close(reader)
        os.close(writer)

    def _wait(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            for key in self._queue_keys:
                if key not in self._waiting:
                    self._waiting[key] = self._send(key)
                    self._since_s[key] = time.monotonic()
            # redis-py has no public way to wait for several connections; `_sock` is in every kind it has.
            sockets = {connection._sock.fileno(): key for key, connection in self._waiting.items()}
            left_s = max(0.0, deadline - time.monotonic())
            # Not select: it takes no descriptor above 1023.
            poll = select.poll()
            for descriptor in (*sockets, self._wake_reader):
                poll.register(descriptor, select.POLLIN)
            readable = [descriptor for descriptor, _ in poll.poll(left_s * 1000)]
            if not readable:
                self._check_silence()
                return False
            found = [self._receive(sockets[descriptor]) for descriptor in readable if descriptor in sockets]
            if any(found) or self._wake_reader in readable:
                self._drain()
                return any(found)

    def _check_silence(self) -> None:
        """Raises redis.TimeoutError where the server should have ended a wait long ago."""
        latest = time.monotonic() - SERVER_TIMEOUT_S - ANSWER_S
        if any(self._since_s[key] < latest for key in self._waiting):
            raise redis.TimeoutError("Redis does not end a wait that is over")

    def _send(self, key: str) -> Any:
        connection = self._pool.get_connection()
        connection.send_command("BLMOVE", key, key, "LEFT", "LEFT", SERVER_TIMEOUT_S)
        return connection

    def _receive(self, key: str) -> bool:
        """Whether the wait that ended found a job, rather than the server's timeout."""
        connection = self._waiting[key]
        if not connection.can_read(timeout=0):
            return False  # a word of TLS, and no answer
        del self._waiting[key]
        try:
            return connection.read_response() is not None
        except redis.ResponseError as err:
            if not is_wrong_type(err):
                raise
            return True  # something else under the queue's name: the claim clears the way
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 1024)
