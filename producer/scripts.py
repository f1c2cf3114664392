"""The Lua scripts beside this package's modules, ready to call on a client.

Knows how scripts are loaded; each script's KEYS and ARGV stand at the head of its file.
"""

from __future__ import annotations

import contextlib
from functools import cache
from importlib.resources import files
from typing import Any

import redis
import redis.asyncio
from redis.commands.core import Script
from redis.exceptions import NoScriptError

#: Attempts to call a script that the server lacks, each after having loaded it.
LOADS = 3


@cache
def source(package: str, name: str) -> str:
    """The text of `NAME.lua` in a package of ours."""
    return files(package).joinpath(f"{name}.lua").read_text(encoding="utf-8")


def load(client: redis.Redis | redis.asyncio.Redis, package: str, name: str) -> Any:
    """A callable `script(keys=[...], args=[...])`: EVALSHA, and the source once where the server lacks it.

    Before it stands what all scripts share, and what those of its package do. With an asyncio client its calls are
    awaited.
    """
    shared = [source(each, "common") for each in dict.fromkeys((__package__, package))]
    text = "".join(shared) + source(package, name)
    if isinstance(client, redis.asyncio.Redis):
        return client.register_script(text)
    return _Script(client, text)


class _Script(Script):
    """Loaded as often as it takes: between loading and the next call the server may lose all scripts, or after a
    failover be another one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(LOADS - 1):
            with contextlib.suppress(NoScriptError):
                return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)
