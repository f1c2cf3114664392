"""Reaching Redis: a client from a URL, and redis-py's errors in our words.

Knows how a connection is made and what its failures mean; knows no keys and no jobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from embedq.producer.errors import (
    ConfigurationError,
    EmbedqError,
    QueueAccessError,
    QueueConnectionError,
    QueueServerError,
)

DEFAULT_URL = "redis://localhost:6379/0"
#: Seconds to wait for a connection, and for the answer to any command that doesn't block.
CONNECT_TIMEOUT_S = 5.0
SOCKET_TIMEOUT_S = 30.0
#: How Redis says that it cannot serve at the moment: as an error of its own class, or from inside a script of ours
#: as text, in which some releases leave out the code.
_PASSING_ERRORS = (redis.ReadOnlyError, redis.OutOfMemoryError, redis.exceptions.MasterDownError)
_PASSING_REPLIES = re.compile(
    r"\b(?:OOM|READONLY|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|BUSY|TRYAGAIN|UNBLOCKED)\b"
    r"|read only replica|when used memory > 'maxmemory'"
)
_FULL = re.compile(r"\bOOM\b|when used memory > 'maxmemory'")
#: How a script says what its user may not do.
_DENIED = re.compile(r"NOPERM|The user executing the script can't (?:run|access)|ACL failure in script")
#: Attempts after the first one, 0.05 to 0.5 s apart. Our scripts change nothing more when they are sent twice.
RETRIES = 2
BACKOFF = ExponentialBackoff(cap=0.5, base=0.05)

Client = TypeVar("Client", redis.Redis, redis.asyncio.Redis)


def connect(url: str, **options: Any) -> redis.Redis:
    """A client for `redis://`, `rediss://` or `unix://`; nothing is sent yet. Raises ConfigurationError."""
    settings = _settings(url, {"retry": Retry(BACKOFF, RETRIES), **options})
    with _readable(url):
        return redis.Redis.from_url(url, **settings)


def connect_async(url: str, **options: Any) -> redis.asyncio.Redis:
    """The same to be awaited, in one event loop."""
    settings = _settings(url, {"retry": AsyncRetry(BACKOFF, RETRIES), **options})
    with _readable(url):
        return redis.asyncio.Redis.from_url(url, **settings)


def _settings(url: str, options: dict[str, Any]) -> dict[str, Any]:
    scheme = url.partition(":")[0] if isinstance(url, str) else ""
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError(
            f"{without_secrets(url)} is no Redis URL; write redis://HOST:PORT/DB, rediss://... or unix:///PATH"
        )
    settings: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "health_check_interval": 30,
        **options,
    }
    if scheme == "unix":
        settings.pop("socket_connect_timeout")
    return settings


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError):
        # The reason may quote a piece of the password.
        raise ConfigurationError(
            f"the Redis URL {without_secrets(url)} cannot be read: check host, port and database, and write"
            " special characters of user and password as %XX"
        ) from None


def check_client(client: Client) -> Client:
    """Raises ConfigurationError for a client that would turn our bytes into strings."""
    if client.connection_pool.connection_kwargs.get("decode_responses"):
        raise ConfigurationError("the Redis client has decode_responses=True; embeddings are bytes, leave it off")
    return client


def without_secrets(url: object) -> str:
    """Of a URL that cannot be used the scheme alone: where the rest cannot be parsed, any of it may be a password."""
    scheme, separator, _ = str(url).partition("://")
    return f"{scheme}{separator}..." if separator else "what was given"


def describe(client: redis.Redis | redis.asyncio.Redis) -> str:
    """Where a client connects to, without credentials: `localhost:6379/0` or a socket's path."""
    kwargs = client.connection_pool.connection_kwargs
    place = kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"
    return f"{place}/{kwargs.get('db') or 0}"


@contextmanager
def translated_errors(client: redis.Redis | redis.asyncio.Redis) -> Iterator[None]:
    """Raises what redis-py raised inside as a QueueConnectionError, QueueAccessError or QueueServerError."""
    try:
        yield
    except redis.RedisError as err:
        raise translate(err, describe(client)) from err


def is_passing(err: redis.RedisError) -> bool:
    """Whether the same call may succeed later: Redis is away, starting, full, or a replica until a failover ends."""
    if isinstance(err, redis.AuthenticationError):
        return False
    if isinstance(err, (redis.ConnectionError, redis.TimeoutError, *_PASSING_ERRORS)):
        return True
    return _PASSING_REPLIES.search(str(err)) is not None


def is_wrong_type(err: redis.RedisError) -> bool:
    """Whether somebody put a key of another type under one of RQ's names. Our scripts clear it away."""
    return "WRONGTYPE" in str(err)


def closed() -> QueueConnectionError:
    """What an awaiting client raises once it was closed: it would open connections that nobody closes."""
    return QueueConnectionError("this queue's client was closed; make another one")


def translate(err: redis.RedisError, place: str) -> EmbedqError:
    reason = " ".join(str(err).split())
    if isinstance(err, redis.exceptions.NoPermissionError) or _DENIED.search(reason):
        return QueueAccessError(f"Redis at {place} does not permit this to its user ({reason}); see users.acl")
    if isinstance(err, redis.AuthenticationError) or "NOAUTH" in reason:
        return QueueAccessError(
            f"Redis at {place} refuses these credentials ({reason}); put them into the URL: redis://USER:PASSWORD@HOST"
        )
    if isinstance(err, redis.exceptions.BusyLoadingError):
        return QueueConnectionError(f"Redis at {place} is still loading its data; try again in a moment")
    if isinstance(err, redis.TimeoutError):
        return QueueConnectionError(f"Redis at {place} does not answer in time ({reason})")
    if isinstance(err, redis.ConnectionError):
        return QueueConnectionError(
            f"no Redis at {place} ({reason}); is it running? `embedq up` starts one, --url or EMBEDQ_URL names another"
        )
    if _FULL.search(reason) or isinstance(err, redis.OutOfMemoryError):
        return QueueServerError(
            f"Redis at {place} is out of memory ({reason}); raise maxmemory, or try again when workers have caught up"
        )
    return QueueServerError(f"Redis at {place} refused a command: {reason}")
