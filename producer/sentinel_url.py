"""What a `redis+sentinel://` URL says: which Sentinels to ask, for which service, and how to talk to its master.

    redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/SERVICE[/DB][?sentinel_password=...&OPTION=...]

Reads text; connects to nothing. User, password and the other options are the master's and are left to redis-py, as in
any Redis URL; `sentinel_username` and `sentinel_password` are for the Sentinels. With `rediss+sentinel://` both are
reached by TLS, with the same `ssl_` options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from embedq.producer.errors import ConfigurationError

#: Sentinel's own port, where a host is named without one.
SENTINEL_PORT = 26379
SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
_PREFIX = "sentinel_"


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    sentinels: list[tuple[str, int]]
    service: str
    #: master and Sentinels alike
    is_tls: bool
    #: a `redis://` or `rediss://` URL of the master, but for its address: nobody listens there
    master_url: str = field(repr=False)
    #: `username` and `password` for the Sentinels, where they want some
    credentials: dict[str, str] = field(repr=False)


def parse(url: str) -> SentinelUrl:
    """Raises ConfigurationError, which quotes nothing that may be a piece of a password, and ValueError."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    service, slash, database = parts.path.removeprefix("/").partition("/")
    if not service:
        raise _unreadable(parts.scheme, "no service is named behind the hosts, as in /mymaster/0")
    if slash and not (database.isascii() and database.isdigit()):
        raise _unreadable(parts.scheme, "behind the service stands the number of a database, as in /mymaster/0")
    options = parse_qsl(parts.query)
    ours = {name.removeprefix(_PREFIX): value for name, value in options if name.startswith(_PREFIX)}
    if ours.keys() - {"username", "password"}:
        raise _unreadable(parts.scheme, "the Sentinels' options are sentinel_username and sentinel_password")
    query = urlencode([(name, value) for name, value in options if not name.startswith(_PREFIX)])
    return SentinelUrl(
        sentinels=[_address(parts.scheme, host) for host in hosts.split(",")],
        service=unquote(service),
        is_tls=parts.scheme.startswith("rediss"),
        master_url=f"{SCHEMES[parts.scheme]}://{credentials}{at}localhost/{database or 0}?{query}",
        credentials=ours,
    )


def _address(scheme: str, host: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        name, port = None, None
    if not name or parts.path or parts.query:
        raise _unreadable(scheme, "the Sentinels are written HOST:PORT, with commas between them") from None
    return unquote(name), SENTINEL_PORT if port is None else port


def _unreadable(scheme: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"the Redis URL {scheme}://... cannot be read: {reason}")
