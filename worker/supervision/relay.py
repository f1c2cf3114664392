"""What a child writes, passed on line by line under the number of its process, and the last of it kept.

Knows lines and bytes; knows neither the child nor where they go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import IO

import orjson

from embedq.producer.checks import printable
from embedq.worker.settings import LogFormat

#: Bytes of a line; what is longer is passed on in pieces.
MAX_LINE_BYTES = 65_536
#: Lines that are kept for an error message.
KEPT_LINES = 20
#: Seconds that the last lines of a process that has ended may take to arrive: another may still hold its output open.
DRAIN_S = 1.0


class LineRelay:
    """Reads `source` to its end on a thread of its own."""

    def __init__(self, source: IO[bytes], label: Callable[[bytes], bytes], write: Callable[[bytes], object]) -> None:
        self._source = source
        self._label = label
        self._write = write
        self._last: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._thread = threading.Thread(target=self._run, name="embedq-relay", daemon=True)
        self._thread.start()

    def last_line(self) -> str:
        """The last that says something, as the child wrote it; empty if there was none. For a child that has ended."""
        self.drain()
        return next((text for line in reversed(self._last) if (text := line.decode(errors="replace").strip())), "")

    def drain(self) -> None:
        """Waits until all that a child which has ended wrote is passed on."""
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        with self._source:
            while line := self._source.readline(MAX_LINE_BYTES):
                line = line.removesuffix(b"\n")
                self._last.append(line)
                try:
                    self._write(self._label(line) + b"\n")
                except OSError:
                    # Nobody reads our output: the child is not to stand still for that.
                    continue


def labelled(log_format: LogFormat, index: int) -> Callable[[bytes], bytes]:
    """Puts the process's number before a line for people, and as a field `process` into one for programs."""
    if log_format == "text":
        prefix = f"[{index}] ".encode()
        return lambda line: prefix + line
    field = f'{{"process":{index}'.encode()

    def as_json(line: bytes) -> bytes:
        if line.startswith(b"{") and line.endswith(b"}") and len(line) > 2:
            return field + b"," + line[1:]
        # What libraries and the interpreter write, they write for people.
        said = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": "info", "logger": "output"}
        return field + b"," + orjson.dumps({**said, "message": printable(line.decode(errors="replace"))})[1:]

    return as_json
