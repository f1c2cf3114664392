"""The Lua scripts beside this package's modules, ready to call on a client.

Knows how scripts are loaded; each script's KEYS and ARGV stand at the head of its file.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import redis
import redis.asyncio


@cache
def source(package: str, name: str) -> str:
    """The text of `NAME.lua` in a package of ours."""
    return files(package).joinpath(f"{name}.lua").read_text(encoding="utf-8")


def load(client: redis.Redis | redis.asyncio.Redis, package: str, name: str) -> Any:
    """A callable `script(keys=[...], args=[...])`: EVALSHA, and the source once where the server lacks it.

    Before it stands what all scripts share, and what those of its package do. With an asyncio client its calls are
    awaited.
    """
    registering: Any = client
    shared = [source(each, "common") for each in dict.fromkeys((__package__, package))]
    return registering.register_script("".join(shared) + source(package, name))
