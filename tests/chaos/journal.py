"""What a producer meant to do and what came of it: a file of JSON lines that is on the disk before the next step.

A process that is killed reads its own file when it starts again; the suite reads all of them while they grow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

Record = dict[str, Any]


class Journal:
    """For one process at a time."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def write(self, **record: Any) -> None:
        """One system call, so that no line is torn when the process is killed."""
        os.write(self._file, orjson.dumps({"at": time.time(), **record}) + b"\n")
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


class JournalReader:
    """Reads on from where it stood."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0

    def read(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._place += len(line)
                yield orjson.loads(line)
