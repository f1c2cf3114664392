"""Several Redis servers as one place: what they are called, and how they are written.

Reads URLs; connects to nothing. A server's name decides which jobs are its own (see `rendezvous`), so that it must
stay the same while they live: by default it is where the server is, without credentials and options.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote, urlsplit

from embedq.producer import sentinel_url
from embedq.producer.checks import shown
from embedq.producer.connection import without_secrets
from embedq.producer.errors import ConfigurationError

#: How shards are given: their URLs, or URLs by name.
ShardUrls = Iterable[str] | Mapping[str, str]

#: Redis' own port, where a host is named without one.
REDIS_PORT = 6379
MAX_NAME_CHARS = 256
#: A password may have a space; what follows white space up to a scheme is another URL.
_BETWEEN = re.compile(r"\s+(?=\S+://)")
_NAMED = re.compile(r"(?P<name>(?:(?!//)[\w.:/-])+)=(?P<url>[a-z+]+://.*)", re.ASCII)


def shard_urls(given: ShardUrls) -> dict[str, str]:
    """URLs by name. Raises ConfigurationError for none, for a URL without a place and for a name that stands twice."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigurationError("the shards are a list of Redis URLs, or a dict of them by name")
    named = given.items() if isinstance(given, Mapping) else [(shard_name(url), url) for url in given]
    found: dict[str, str] = {}
    for name, url in named:
        _check_new(name, found)
        found[name] = url
    if not found:
        raise ConfigurationError("there must be one shard at least")
    return found


def shard_name(url: object) -> str:
    """`redis-1:6379/0`, `/run/redis.sock/0`, or by Sentinel `mymaster/0`, whichever Sentinels are named.

    Raises ConfigurationError.
    """
    try:
        if not isinstance(url, str):
            raise ValueError("no string")
        parts = urlsplit(url)
        if parts.scheme in sentinel_url.SCHEMES:
            service, _, database = parts.path.removeprefix("/").partition("/")
            return f"{unquote(service)}/{database or 0}"
        if parts.scheme == "unix":
            return f"{unquote(parts.path)}/{_database_option(parts.query)}"
        database = parts.path.strip("/") or _database_option(parts.query)
        return f"{parts.hostname or 'localhost'}:{parts.port or REDIS_PORT}/{database}"
    except ValueError:
        raise ConfigurationError(f"the Redis URL {without_secrets(url)} cannot be read") from None


def split_urls(text: str) -> list[str]:
    """The URLs of a setting with white space between them."""
    return _BETWEEN.split(text.strip())


def read_urls(text: str) -> dict[str, str]:
    """The same, each perhaps written NAME=URL, by name. Raises ConfigurationError."""
    found: dict[str, str] = {}
    for word in split_urls(text):
        match = _NAMED.fullmatch(word)
        name, url = (match["name"], match["url"]) if match else (shard_name(word), word)
        _check_new(name, found)
        found[name] = url
    return found


def _check_new(name: object, found: Mapping[str, str]) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ConfigurationError(f"a shard's name is 1 to {MAX_NAME_CHARS} printable characters, not {shown(name)}")
    if name in found:
        raise ConfigurationError(f"two shards are called {name}; give each server once, or names of their own")


def _database_option(query: str) -> str:
    return next((value for name, _, value in (each.partition("=") for each in query.split("&")) if name == "db"), "0")
