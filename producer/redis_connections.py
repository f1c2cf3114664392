"""redis-py's connections with what a fleet needs of them: none stays with a server that is no master any more, and a
TLS handshake ends in time and says when it was refused.

Knows sockets and redis-py's classes; knows no URLs and no commands. Each class has its twin for asyncio.
"""

from __future__ import annotations

import re
import ssl
from typing import Any

import redis
import redis.asyncio

#: A replica's answer to a write: as an error of its own class, or out of a script as text, in which Redis 6 puts its
#: own code first.
_DEMOTED = re.compile(r"\bREADONLY\b|read only replica")
#: Endings of a TLS connection that are no refusal: the other side has just gone.
_TLS_ENDINGS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class TLSRefusedError(redis.ConnectionError):
    """One side of the handshake does not accept the other's certificate, or the other does not speak TLS."""


class TLSTimeoutError(redis.RedisError):
    """No handshake in time. No ConnectionError, so that redis-py does not try it three times over."""


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


class PlainConnection(LeavesReplicas, redis.Connection):
    pass


class TLSConnection(ShakesHands, LeavesReplicas, redis.SSLConnection):
    pass


class AsyncPlainConnection(LeavesReplicasAsync, redis.asyncio.Connection):
    pass


class AsyncTLSConnection(ShakesHandsAsync, LeavesReplicasAsync, redis.asyncio.SSLConnection):
    pass
