"""Counts what goes between a client and Redis: round trips, errors, and when the last answer came.

At the connections, so that whatever uses the client is counted. Knows redis-py's connections; no commands.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import redis
from redis.exceptions import NoScriptError

#: Counted from 0, so that the first one shows as a change.
USUAL_ERRORS = ("ConnectionError", "TimeoutError")
#: On an error that is counted: it goes through several methods of a connection.
_MARK = "_embedq_is_counted"


class Traffic:
    """Attributes: round_trips (how often something was sent after what came before was answered); errors (by the name
    of redis-py's class); last_contact (of the monotonic clock, None before the first answer).
    """

    def __init__(self) -> None:
        self.round_trips = 0
        self.errors: Counter[str] = Counter(dict.fromkeys(USUAL_ERRORS, 0))
        self.last_contact: float | None = None
        self._lock = threading.Lock()

    def watch(self, client: redis.Redis) -> None:
        """Of all that the client does from now on. Nothing of it may be under way."""
        pool: Any = client.connection_pool
        pool.connection_class = _counting(pool.connection_class, self)
        # Connections that were made before would not be counted.
        pool.disconnect(inuse_connections=False)
        pool.reset()

    def count_round_trip(self) -> None:
        with self._lock:
            self.round_trips += 1

    def count_error(self, err: redis.RedisError) -> None:
        """Not that of a script which the server is sent once."""
        if isinstance(err, NoScriptError) or _is_counted(err):
            return
        setattr(err, _MARK, True)
        with self._lock:
            self.errors[type(err).__name__] += 1


def _is_counted(err: BaseException) -> bool:
    return hasattr(err, _MARK) or (err.__cause__ is not None and hasattr(err.__cause__, _MARK))


def _counting(kind: Any, traffic: Traffic) -> Any:
    class Counting(kind):  # type: ignore[misc]
        #: whether something was sent since the last answer
        _has_asked = False
        _is_connecting = False

        def connect_check_health(self, *args: Any, **kwargs: Any) -> Any:
            """On the way redis-py takes some errors for an answer: an older server does not know every command."""
            self._is_connecting = True
            try:
                return super().connect_check_health(*args, **kwargs)
            except redis.RedisError as err:
                traffic.count_error(err)
                raise
            finally:
                self._is_connecting = False

        def send_packed_command(self, *args: Any, **kwargs: Any) -> Any:
            try:
                super().send_packed_command(*args, **kwargs)
            except redis.RedisError as err:
                traffic.count_error(err)
                raise
            if not self._has_asked:
                self._has_asked = True
                traffic.count_round_trip()

        def can_read(self, *args: Any, **kwargs: Any) -> Any:
            """Finds out, too, that the server has hung up."""
            try:
                return super().can_read(*args, **kwargs)
            except redis.RedisError as err:
                traffic.count_error(err)
                raise

        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            self._has_asked = False
            try:
                answer = super().read_response(*args, **kwargs)
            except redis.ResponseError as err:
                traffic.last_contact = time.monotonic()
                if not self._is_connecting:
                    traffic.count_error(err)
                raise
            except redis.RedisError as err:
                if not self._is_connecting:
                    traffic.count_error(err)
                raise
            traffic.last_contact = time.monotonic()
            return answer

    return Counting
