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
from embedq.producer.connection import DEFAULT_URL, without_secrets
from embedq.producer.errors import ConfigurationError

#: How shards are given: their URLs, or URLs by name.
ShardUrls = Iterable[str] | Mapping[str, str]

#: Redis' own port, where a host is named without one.
REDIS_PORT = 6379
MAX_NAME_CHARS = 256
_NAMED = re.compile(r"(?P<name>(?:(?!//)[\w.:/-])+)=(?P<url>[a-z+]+://.*)", re.ASCII)


def shard_urls(given: ShardUrls) -> dict[str, str]:
    """URLs by name. Raises ConfigurationError for none, for a URL without a place and for a name that stands twice."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigurationError("the shards are a list of Redis URLs, or a dict of them by name")
    named = given.items() if isinstance(given, Mapping) else [(shard_name(url), url) for url in given]
    found: dict[str, str] = {}
    for name, url in named:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise ConfigurationError(f"a shard's name is 1 to {MAX_NAME_CHARS} printable characters, not {shown(name)}")
        if name in found:
            raise ConfigurationError(f"the shard {name} is there twice")
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


def read_urls(text: str) -> dict[str, str]:
    """Of a setting, EMBEDQ_URL or `--url`: URLs with white space between them, each perhaps as NAME=URL, by name.

    Raises ConfigurationError.
    """
    found: list[tuple[str, str]] = []
    for word in text.split() or [DEFAULT_URL]:
        match = _NAMED.fullmatch(word)
        found.append((match["name"], match["url"]) if match else (shard_name(word), word))
    if len(dict(found)) < len(found):
        raise ConfigurationError("two of the Redis URLs are of one shard; name each server once")
    return shard_urls(dict(found))


def _database_option(query: str) -> str:
    return next((value for name, _, value in (each.partition("=") for each in query.split("&")) if name == "db"), "0")
