"""Reaching Redis: a client from a URL, and redis-py's errors in our words.

Knows how a connection is made and what its failures mean; knows no keys and no jobs.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from embedq.producer import sentinel, sentinel_url
from embedq.producer.errors import (
    ConfigurationError,
    EmbedqError,
    QueueAccessError,
    QueueConnectionError,
    QueueServerError,
)
from embedq.producer.redis_connections import (
    AsyncPlainConnection,
    AsyncTLSConnection,
    AsyncUnixConnection,
    ConnectTimeoutError,
    PlainConnection,
    TLSConnection,
    TLSRefusedError,
    TLSTimeoutError,
    UnixConnection,
)

DEFAULT_URL = "redis://localhost:6379/0"
#: Seconds to wait for a connection, for it to begin, and for the answer to any command that doesn't block.
CONNECT_TIMEOUT_S = 5.0
SOCKET_TIMEOUT_S = 30.0
#: How Redis says that it cannot serve at the moment: as an error of its own class, or from inside a script of ours
#: as text, in which some releases leave out the code.
_PASSING_ERRORS = (redis.ReadOnlyError, redis.OutOfMemoryError, redis.exceptions.MasterDownError)
_PASSING_REPLIES = re.compile(
    r"\b(?:OOM|READONLY|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|BUSY|TRYAGAIN|UNBLOCKED|NOSCRIPT)\b"
    r"|read only replica|when used memory > 'maxmemory'"
)
_FULL = re.compile(r"\bOOM\b|when used memory > 'maxmemory'")
#: How redis-py says that the other side ended a connection which it had accepted.
_HUNG_UP = re.compile(r"Connection closed|reset by peer|Broken pipe|EOF occurred")
#: How a script says what its user may not do.
_DENIED = re.compile(r"NOPERM|The user executing the script can't (?:run|access)|ACL failure in script")
_DATABASE = re.compile(r"/\d{1,9}/?", re.ASCII)
#: Attempts after the first one, 0.05 to 0.5 s apart. Our scripts change nothing more when they are sent twice.
RETRIES = 2
BACKOFF = ExponentialBackoff(cap=0.5, base=0.05)

#: What redis-py itself tries again, on a new connection: also what a replica refused.
_RETRIED: Any = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError)
#: By the URL's scheme.
_CONNECTIONS: dict[str, Any] = {
    "redis": PlainConnection,
    "rediss": TLSConnection,
    "unix": UnixConnection,
}
_ASYNC_CONNECTIONS: dict[str, Any] = {
    "redis": AsyncPlainConnection,
    "rediss": AsyncTLSConnection,
    "unix": AsyncUnixConnection,
}

Client = TypeVar("Client", redis.Redis, redis.asyncio.Redis)


def _may_help(err: Exception) -> bool:
    """Whether to try again. A server that lets a new connection wait hangs, and redis-py has retries inside retries:
    all would wait.
    """
    return not isinstance(err, ConnectTimeoutError)


class _Retry(Retry):
    def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = _may_help, with_failure_count: bool = False
    ) -> Any:
        return super().call_with_retry(do, fail, is_retryable, with_failure_count)


class _AsyncRetry(AsyncRetry):
    async def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = _may_help, with_failure_count: bool = False
    ) -> Any:
        return await super().call_with_retry(do, fail, is_retryable, with_failure_count)


def connect(url: str, **options: Any) -> redis.Redis:
    """A client for `redis://`, `rediss://` or `unix://`, or of the master that Sentinel names for `redis+sentinel://`
    or `rediss+sentinel://` (see `sentinel_url`); nothing is sent yet. Raises ConfigurationError.

    A Redis that hangs is given up after CONNECT_TIMEOUT_S where a connection is to begin, and after SOCKET_TIMEOUT_S +
    CONNECT_TIMEOUT_S, 35 s, by a call on one that was there already, as it tries another: so may a blocking wait for
    a result last longer than its own time limit.
    """
    settings = _settings(url, {"retry": _Retry(BACKOFF, RETRIES, _RETRIED), **options})
    with _readable(url):
        _check_parts(url)
        if (scheme := _scheme(url)) in sentinel_url.SCHEMES:
            client = sentinel.connect(url, settings)
        else:
            client = redis.Redis.from_url(url, **settings)
            client.connection_pool.connection_class = _CONNECTIONS[scheme]
        _check_options(client)
    return client


def connect_async(url: str, **options: Any) -> redis.asyncio.Redis:
    """The same to be awaited, in one event loop."""
    settings = _settings(url, {"retry": _AsyncRetry(BACKOFF, RETRIES, _RETRIED), **options})
    with _readable(url):
        _check_parts(url)
        if (scheme := _scheme(url)) in sentinel_url.SCHEMES:
            client = sentinel.connect_async(url, settings)
        else:
            client = redis.asyncio.Redis.from_url(url, **settings)
            client.connection_pool.connection_class = _ASYNC_CONNECTIONS[scheme]
        _check_options(client)
    return client


def _scheme(url: object) -> str:
    return url.partition(":")[0] if isinstance(url, str) else ""


def _settings(url: str, options: dict[str, Any]) -> dict[str, Any]:
    scheme = _scheme(url)
    if isinstance(url, str) and len(url.split("://")) > 2 and len(url.split()) > 1:
        raise ConfigurationError(
            f"{without_secrets(url)} names several servers where one is meant; a worker, for example, serves one: start"
            " one for each"
        )
    if scheme not in (*_CONNECTIONS, *sentinel_url.SCHEMES):
        raise ConfigurationError(
            f"{without_secrets(url)} is no Redis URL; write redis://HOST:PORT/DB, rediss://..., unix:///PATH or"
            " redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB"
        )
    settings: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "health_check_interval": 30,
        # A peer that vanished without a word is noticed also by who only listens.
        "socket_keepalive": True,
        **options,
    }
    if scheme == "unix":
        del settings["socket_keepalive"]
    if scheme.startswith("rediss"):
        # The defaults of today's redis-py, and no others, however it changes them.
        settings |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    return settings


def _check_parts(url: str) -> None:
    """Raises ValueError where a `/`, `?` or `#` of a password has ended the host: what comes before it would be taken
    for the server's name, and told.
    """
    parts = urlsplit(url)
    if "#" in url or "@" in parts.path + parts.query:
        raise ValueError("more than a path and options behind the host")
    if parts.scheme in ("redis", "rediss") and parts.path.strip("/") and not _DATABASE.fullmatch(parts.path):
        raise ValueError("no database's number")


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError:
        raise
    except (ValueError, TypeError, redis.RedisError):
        # The reason may quote a piece of the password.
        hint = "hosts, ports, service" if _scheme(url) in sentinel_url.SCHEMES else "host, port"
        raise ConfigurationError(
            f"the Redis URL {without_secrets(url)} cannot be read: check {hint}, database and options, and write"
            " special characters of user and password as %XX"
        ) from None


def _check_options(client: redis.Redis | redis.asyncio.Redis) -> None:
    """What would otherwise be found out by each connection: options that there are not, certificates not to be read."""
    pool = client.connection_pool
    pool.connection_class(**pool.connection_kwargs)
    given = {name: value for name, value in pool.connection_kwargs.items() if name.startswith("ssl_") and value}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if given.keys() & {"ssl_ca_certs", "ssl_ca_path"}:
            context.load_verify_locations(given.get("ssl_ca_certs"), given.get("ssl_ca_path"))
        if given.keys() & {"ssl_certfile", "ssl_keyfile"}:
            # With a password, be it empty, nobody is asked for one on the terminal.
            context.load_cert_chain(
                given.get("ssl_certfile", ""), given.get("ssl_keyfile"), given.get("ssl_password", "")
            )
    except OSError as err:
        reason = (isinstance(err, ssl.SSLError) and err.reason) or err.strerror or type(err).__name__
        files = "ssl_ca_certs, ssl_certfile or ssl_keyfile"
        raise ConfigurationError(f"a file that the Redis URL names by {files} cannot be used: {reason}") from err


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
    """Where a client connects to, without credentials: `localhost:6379/0`, a socket's path, or whom Sentinel names."""
    if by_sentinel := sentinel.describe(client.connection_pool):
        return by_sentinel
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
    if isinstance(err, (redis.AuthenticationError, TLSRefusedError)):
        return False
    if isinstance(err, (redis.ConnectionError, redis.TimeoutError, TLSTimeoutError, *_PASSING_ERRORS)):
        return True
    return _PASSING_REPLIES.search(str(err)) is not None


def is_wrong_type(err: redis.RedisError) -> bool:
    """Whether somebody put a key of another type under one of RQ's names. Our scripts clear it away."""
    return "WRONGTYPE" in str(err)


def is_denied(err: redis.RedisError) -> bool:
    """Whether Redis' user may not do this (see users.acl), be it by itself or in a script."""
    return isinstance(err, redis.exceptions.NoPermissionError) or _DENIED.search(str(err)) is not None


def closed() -> QueueConnectionError:
    """What an awaiting client raises once it was closed: it would open connections that nobody closes."""
    return QueueConnectionError("this queue's client was closed; make another one")


def translate(err: redis.RedisError, place: str) -> EmbedqError:
    reason = " ".join(str(err).split())
    if is_denied(err):
        return QueueAccessError(f"Redis at {place} does not permit this to its user ({reason}); see users.acl")
    if isinstance(err, redis.AuthenticationError) or "NOAUTH" in reason:
        return QueueAccessError(
            f"Redis at {place} refuses these credentials ({reason}); put them into the URL: redis://USER:PASSWORD@HOST"
        )
    if isinstance(err, TLSRefusedError):
        return QueueAccessError(
            f"no TLS with Redis at {place} ({reason}); the URL names your CA by ?ssl_ca_certs=PATH, and a certificate"
            " of your own by &ssl_certfile=PATH&ssl_keyfile=PATH"
        )
    if isinstance(err, TLSTimeoutError):
        return QueueConnectionError(f"Redis at {place} does not answer ({reason}); does it speak TLS on that port?")
    if isinstance(err, redis.exceptions.BusyLoadingError):
        return QueueConnectionError(f"Redis at {place} is still loading its data; try again in a moment")
    if isinstance(err, redis.TimeoutError):
        return QueueConnectionError(f"Redis at {place} does not answer in time ({reason})")
    if isinstance(err, redis.ConnectionError) and _HUNG_UP.search(reason):
        return QueueConnectionError(
            f"Redis at {place} hung up ({reason}); is it going down, or does that port want TLS (rediss://), or your"
            " certificate (ssl_certfile)?"
        )
    if isinstance(err, redis.ConnectionError):
        return QueueConnectionError(
            f"no Redis at {place} ({reason}); is it running? `embedq up` starts one, --url or EMBEDQ_URL names another"
        )
    if _FULL.search(reason) or isinstance(err, redis.OutOfMemoryError):
        return QueueServerError(
            f"Redis at {place} is out of memory ({reason}); raise maxmemory, or try again when workers have caught up"
        )
    return QueueServerError(f"Redis at {place} refused a command: {reason}")
