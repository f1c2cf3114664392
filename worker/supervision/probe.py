"""Asks a child how it is: GET of its /livez and /readyz over the loopback, again and again, on a thread of its own.

Knows HTTP's client side and no processes; what an answer leads to is the caller's.
"""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass

#: Seconds between two looks at a process that is ready, and at one that is not yet.
PROBE_EVERY_S, PROBE_STARTING_EVERY_S = 1.0, 0.2
#: Seconds for an answer.
TIMEOUT_S = 2.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ChildHealth:
    #: None: no answer
    is_live: bool | None
    is_ready: bool
    #: one line
    why: str


NO_ANSWER = ChildHealth(None, False, "no answer yet")


@dataclass(frozen=True, slots=True)
class Fetched:
    status: int
    body: str
    content_type: str


def fetch(port: int, path: str, timeout_s: float = TIMEOUT_S, accept: str = "") -> Fetched:
    """Raises OSError or http.client.HTTPException."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Accept": accept} if accept else {})
        answer = connection.getresponse()
        body = answer.read().decode("utf-8", errors="replace")
        return Fetched(answer.status, body, answer.getheader("Content-Type", ""))
    finally:
        connection.close()


def look(port: int) -> ChildHealth:
    try:
        live = fetch(port, "/livez")
        if live.status != http.client.OK:
            return ChildHealth(False, False, _line(live))
        ready = fetch(port, "/readyz")
    except (OSError, http.client.HTTPException) as err:
        return ChildHealth(None, False, f"no answer: {str(err) or type(err).__name__}")
    return ChildHealth(True, ready.status == http.client.OK, _line(ready))


def _line(answer: Fetched) -> str:
    return " ".join(answer.body.split())[:200]


class Probe:
    """Attributes: latest (the last answer)."""

    def __init__(self, port: int) -> None:
        self.latest = NO_ANSWER
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embedq-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set():
            self.latest = look(self._port)
            self._is_over.wait(PROBE_EVERY_S if self.latest.is_ready else PROBE_STARTING_EVERY_S)
