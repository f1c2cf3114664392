"""Clients that ask Sentinel where the master is, each time they connect: `redis+sentinel://` URLs.

Knows redis-py's Sentinel classes, made to close what they opened and to say in one line why there is no master; how a
URL is read is in `sentinel_url`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.connection
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

from embedq.producer import sentinel_url
from embedq.producer.redis_connections import (
    AsyncPlainConnection,
    AsyncTLSConnection,
    BeginsInTime,
    BeginsInTimeAsync,
    LeavesReplicas,
    LeavesReplicasAsync,
    PlainConnection,
    ServerTooOldError,
    ShakesHands,
    ShakesHandsAsync,
    TLSConnection,
    TLSRefusedError,
    tls_refusal,
)
from embedq.producer.sentinel_url import SentinelUrl

#: Seconds that one Sentinel may take to connect, and to answer: then the next one is asked.
SENTINEL_TIMEOUT_S = 2.0


class _AsksSentinel:
    """Asks again also where redis-py sends a command anew on a connection that broke: by itself it would go to the same
    address."""

    def send_packed_command(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._sock is None:
            self.connect()
        return super().send_packed_command(*args, **kwargs)  # type: ignore[misc]


class _AsksSentinelAsync:
    async def send_packed_command(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_connected:
            await self.connect()
        return await super().send_packed_command(*args, **kwargs)  # type: ignore[misc]


class _MasterConnection(LeavesReplicas, BeginsInTime, _AsksSentinel, redis.sentinel.SentinelManagedConnection):
    pass


class _TLSMasterConnection(
    ShakesHands, LeavesReplicas, BeginsInTime, _AsksSentinel, redis.sentinel.SentinelManagedSSLConnection
):
    pass


class _AsyncMasterConnection(
    LeavesReplicasAsync, BeginsInTimeAsync, _AsksSentinelAsync, redis.asyncio.sentinel.SentinelManagedConnection
):
    pass


class _AsyncTLSMasterConnection(
    ShakesHandsAsync,
    LeavesReplicasAsync,
    BeginsInTimeAsync,
    _AsksSentinelAsync,
    redis.asyncio.sentinel.SentinelManagedSSLConnection,
):
    pass


class _Sentinels(redis.sentinel.Sentinel):
    """As redis-py's, but for the error: where none names a master it says why in one line."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        # Others may ask at the same time: the list is never changed, another one takes its place.
        asked, errors = self.sentinels, []
        for sentinel in asked:
            try:
                masters: Any = sentinel.sentinel_masters()
            except redis.RedisError as err:
                errors.append(err)
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                self.sentinels = [sentinel, *(other for other in asked if other is not sentinel)]
                return state["ip"], state["port"]
        raise _no_master(service_name, len(asked), errors)


class _AsyncSentinels(redis.asyncio.sentinel.Sentinel):
    async def discover_master(self, service_name: str) -> tuple[str, int]:
        # Others may ask at the same time: the list is never changed, another one takes its place.
        asked, errors = self.sentinels, []
        for sentinel in asked:
            try:
                masters: Any = await sentinel.sentinel_masters()
            except redis.RedisError as err:
                errors.append(err)
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):
                self.sentinels = [sentinel, *(other for other in asked if other is not sentinel)]
                return state["ip"], state["port"]
        raise _no_master(service_name, len(asked), errors)


class _MasterPool(redis.sentinel.SentinelConnectionPool):
    """Closes the connections to the Sentinels with its own."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                sentinel.close()


class _AsyncMasterPool(redis.asyncio.sentinel.SentinelConnectionPool):
    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


def connect(url: str, settings: Mapping[str, Any]) -> redis.Redis:
    """`settings` are the connections' to the master; the URL's go before. Raises as `sentinel_url.parse`."""
    parsed = sentinel_url.parse(url)
    settings = {**settings, **_options(parsed)}
    asked = {**_asking(parsed, settings), "retry": Retry(NoBackoff(), 0)}
    sentinels: Any = _Sentinels(parsed.sentinels, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
    for sentinel in sentinels.sentinels:
        sentinel.connection_pool.connection_class = TLSConnection if parsed.is_tls else PlainConnection
    client: redis.Redis = sentinels.master_for(
        parsed.service,
        connection_pool_class=_MasterPool,
        connection_class=_TLSMasterConnection if parsed.is_tls else _MasterConnection,
        **settings,
    )
    return client


def connect_async(url: str, settings: Mapping[str, Any]) -> redis.asyncio.Redis:
    """The same to be awaited."""
    parsed = sentinel_url.parse(url)
    settings = {**settings, **_options(parsed)}
    asked = {**_asking(parsed, settings), "retry": AsyncRetry(NoBackoff(), 0)}
    sentinels: Any = _AsyncSentinels(parsed.sentinels, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
    for sentinel in sentinels.sentinels:
        sentinel.connection_pool.connection_class = AsyncTLSConnection if parsed.is_tls else AsyncPlainConnection
    client: redis.asyncio.Redis = sentinels.master_for(
        parsed.service,
        connection_pool_class=_AsyncMasterPool,
        connection_class=_AsyncTLSMasterConnection if parsed.is_tls else _AsyncMasterConnection,
        **settings,
    )
    return client


def describe(pool: Any) -> str | None:
    """`mymaster/0 by Sentinel at HOST:PORT, HOST:PORT`; None for a pool of another kind."""
    if not isinstance(pool, (redis.sentinel.SentinelConnectionPool, redis.asyncio.sentinel.SentinelConnectionPool)):
        return None
    asked = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    places = sorted(f"{each['host']}:{each['port']}" for each in asked)
    return f"{pool.service_name}/{pool.connection_kwargs.get('db') or 0} by Sentinel at {', '.join(places)}"


def _options(url: SentinelUrl) -> dict[str, Any]:
    """What redis-py reads off the master's URL, but for its address."""
    read_url: Any = redis.connection.parse_url
    address = ("host", "port", "connection_class")
    return {name: value for name, value in read_url(url.master_url).items() if name not in address}


def _asking(url: SentinelUrl, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How each Sentinel is reached: by TLS where the master is, as itself and with its own credentials."""
    asked: dict[str, Any] = {"socket_connect_timeout": SENTINEL_TIMEOUT_S, "socket_timeout": SENTINEL_TIMEOUT_S}
    if url.is_tls:
        asked |= {"ssl": True, **{name: value for name, value in settings.items() if name.startswith("ssl_")}}
    return {**asked, **url.credentials}


def _no_master(service: str, num_asked: int, errors: Sequence[redis.RedisError]) -> redis.RedisError:
    """`errors`: what asking a Sentinel ended in, where it could not be asked.

    A refusal only where all refuse: while one can be asked, it may name a master when a failover has ended.
    """
    refusals = [refusal for err in errors if (refusal := _refusal(err))]
    if refusals and len(refusals) == num_asked:
        return refusals[0]
    asked = "no Sentinel that can be reached" if errors else "no Sentinel"
    return MasterNotFoundError(f"{asked} names a live master of the service {service!r}")


def _refusal(err: redis.RedisError) -> redis.RedisError | None:
    """None where the Sentinel may answer later."""
    if isinstance(err, redis.AuthenticationError):
        return redis.AuthenticationError("a Sentinel refuses sentinel_username and sentinel_password")
    if refusal := tls_refusal(err):
        return TLSRefusedError(f"a Sentinel: {refusal}")
    return err if isinstance(err, (redis.ResponseError, ServerTooOldError)) else None
