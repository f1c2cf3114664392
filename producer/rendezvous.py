"""Which of several servers a name belongs to, by rendezvous hashing: the server whose hash with the name is highest.

Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM Transactions on Networking 6(1),
1998. Pure: whoever knows the servers' names, in whatever order, finds the same one. A server more takes its share of
all names, and no name moves between the others. Knows neither Redis nor jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import TypeVar

Item = TypeVar("Item")

#: Bytes of a hash: ties are as good as impossible.
SCORE_BYTES = 8


class Rendezvous:
    """Servers by their names, at least one."""

    def __init__(self, names: Iterable[str]) -> None:
        #: each with what has been hashed so far
        self._hashes = {name: blake2b(name.encode() + b"\0", digest_size=SCORE_BYTES) for name in sorted(names)}
        self.names = tuple(self._hashes)

    def home(self, key: str) -> str:
        """The server of the highest hash."""
        if len(self.names) == 1:
            return self.names[0]
        encoded = key.encode()
        return max(self.names, key=lambda name: self._score(name, encoded))

    def ranked(self, key: str) -> list[str]:
        """All servers, highest hash first: without the first one the second would be home."""
        encoded = key.encode()
        return sorted(self.names, key=lambda name: self._score(name, encoded), reverse=True)

    def split(self, items: Iterable[Item], key: Callable[[Item], str]) -> Mapping[str, list[Item]]:
        """Items by their homes, in order within each."""
        parts: dict[str, list[Item]] = {}
        for item in items:
            parts.setdefault(self.home(key(item)), []).append(item)
        return parts

    def _score(self, name: str, key: bytes) -> bytes:
        hashed = self._hashes[name].copy()
        hashed.update(key)
        return hashed.digest()
