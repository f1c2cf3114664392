"""redis-py's connections with what a fleet needs of them: none stays with a server that is no master any more, all are
made in time or not at all, none tells a password, and a TLS handshake says when it was refused.

Knows sockets and redis-py's classes; knows no URLs and no commands. Each class has its twin for asyncio.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import Any

import redis
import redis.asyncio

#: A replica's answer to a write: as an error of its own class, or out of a script as text, in which Redis 6 puts its
#: own code first.
_DEMOTED = re.compile(r"\bREADONLY\b|read only replica")
#: A server's answer to a command that it does not know: it quotes the arguments.
_UNKNOWN = re.compile(r"unknown command", re.IGNORECASE)
#: Endings of a TLS connection that are no refusal: the other side has just gone.
_TLS_ENDINGS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class TLSRefusedError(redis.ConnectionError):
    """One side of the handshake does not accept the other's certificate, or the other does not speak TLS."""


class TLSTimeoutError(redis.RedisError):
    """No handshake in time. No ConnectionError, so that redis-py does not try it three times over."""


class ConnectTimeoutError(redis.TimeoutError):
    """No connection in time, or no answer to the commands that begin it."""


class ServerTooOldError(redis.RedisError):
    """A command that begins a connection is not known to the server."""

    def __init__(self) -> None:
        super().__init__("it does not know a command that begins a connection, as HELLO; Redis 6.2 or later is needed")


def tls_refusal(err: BaseException) -> TLSRefusedError | None:
    """Says so if a refusal is what redis-py made this error of."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _TLS_ENDINGS):
            return TLSRefusedError(_tls_reason(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def _handshake_failure(err: redis.RedisError) -> redis.RedisError | None:
    if isinstance(err, redis.TimeoutError) and "connecting" in str(err):
        return TLSTimeoutError("no TLS handshake in time")
    return tls_refusal(err)


def _tls_reason(err: ssl.SSLError) -> str:
    if isinstance(err, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {err.verify_message}"
    return (err.reason or "the handshake failed").lower().replace("_", " ")


class BeginsInTime:
    """Waits `socket_connect_timeout`, not `socket_timeout`, for each answer that begins a connection. Says nothing of
    what a server quotes that does not know HELLO: user and password.
    """

    def connect_check_health(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().connect_check_health(*args, **kwargs)  # type: ignore[misc]
        except redis.TimeoutError as err:
            raise ConnectTimeoutError(str(err)) from err

    def on_connect_check_health(self: Any, *_: Any, **__: Any) -> None:
        """Without redis-py's PING before the first command, which it would try again."""
        self._sock.settimeout(self.socket_connect_timeout)
        try:
            super().on_connect_check_health(check_health=False)  # type: ignore[misc]
            self._sock.settimeout(self.socket_timeout)
            return
        except redis.ResponseError as err:
            if not _UNKNOWN.search(str(err)):
                raise
        # Out here, so that the error brings no other along.
        raise ServerTooOldError


class BeginsInTimeAsync:
    """Waits `socket_connect_timeout` for all of them together."""

    async def connect_check_health(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().connect_check_health(*args, **kwargs)  # type: ignore[misc]
        except redis.TimeoutError as err:
            raise ConnectTimeoutError(str(err)) from err

    async def on_connect_check_health(self: Any, *_: Any, **__: Any) -> None:
        try:
            async with asyncio.timeout(self.socket_connect_timeout):
                await super().on_connect_check_health(check_health=False)  # type: ignore[misc]
            return
        except TimeoutError:
            raise redis.TimeoutError(f"Timeout reading from {self._host_error()}") from None
        except redis.ResponseError as err:
            if not _UNKNOWN.search(str(err)):
                raise
        raise ServerTooOldError


class LeavesReplicas:
    """Connects anew before the next command where the server turned out to be a replica.

    A name, or Sentinel, may lead to the new master meanwhile; the old one would refuse all that is sent to it.
    """

    _is_demoted = False

    def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError as err:
            if not _DEMOTED.search(str(err)):
                raise
            # Not at once: the rest of a pipeline's replies is still to be read.
            self._is_demoted = True
            raise redis.ReadOnlyError(str(err)) from err

    def send_packed_command(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_demoted:
            self._is_demoted = False
            self.disconnect()
        return super().send_packed_command(*args, **kwargs)  # type: ignore[misc]


class LeavesReplicasAsync:
    _is_demoted = False

    async def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError as err:
            if not _DEMOTED.search(str(err)):
                raise
            self._is_demoted = True
            raise redis.ReadOnlyError(str(err)) from err

    async def send_packed_command(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_demoted:
            self._is_demoted = False
            await self.disconnect()
        return await super().send_packed_command(*args, **kwargs)  # type: ignore[misc]


class ShakesHands:
    """TLS: the handshake within `socket_connect_timeout`, which redis-py has for the TCP connection alone."""

    def _wrap_socket_with_ssl(self: Any, sock: Any) -> Any:
        sock.settimeout(self.socket_connect_timeout)
        wrapped = super()._wrap_socket_with_ssl(sock)  # type: ignore[misc]
        wrapped.settimeout(self.socket_timeout)
        return wrapped

    def connect_check_health(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().connect_check_health(*args, **kwargs)  # type: ignore[misc]
        except (redis.TimeoutError, redis.ConnectionError) as err:
            if failure := _handshake_failure(err):
                raise failure from err
            raise

    def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        """With TLS 1.3 a server refuses the client's certificate after the handshake."""
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ConnectionError as err:
            if refusal := tls_refusal(err):
                raise refusal from err
            raise


class ShakesHandsAsync:
    async def connect_check_health(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().connect_check_health(*args, **kwargs)  # type: ignore[misc]
        except (redis.TimeoutError, redis.ConnectionError) as err:
            if failure := _handshake_failure(err):
                raise failure from err
            raise

    async def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ConnectionError as err:
            if refusal := tls_refusal(err):
                raise refusal from err
            raise


class PlainConnection(LeavesReplicas, BeginsInTime, redis.Connection):
    pass


class TLSConnection(ShakesHands, LeavesReplicas, BeginsInTime, redis.SSLConnection):
    pass


class UnixConnection(LeavesReplicas, BeginsInTime, redis.UnixDomainSocketConnection):
    pass


class AsyncPlainConnection(LeavesReplicasAsync, BeginsInTimeAsync, redis.asyncio.Connection):
    pass


class AsyncTLSConnection(ShakesHandsAsync, LeavesReplicasAsync, BeginsInTimeAsync, redis.asyncio.SSLConnection):
    pass


class AsyncUnixConnection(LeavesReplicasAsync, BeginsInTimeAsync, redis.asyncio.UnixDomainSocketConnection):
    async def _connect(self: Any) -> None:
        """redis-py's begins the connection here as well, past any limit of time, and once more afterwards."""
        async with asyncio.timeout(self.socket_connect_timeout):
            self._reader, self._writer = await asyncio.open_unix_connection(path=self.path)
