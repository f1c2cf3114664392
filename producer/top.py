"""`embedq top`: looks at a fleet again and again, and shows it until it is told to end. Knows the terminal; what is
seen is in `fleet` and `failed`, how it looks in `top_frame`.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import redis
from rich.console import Console
from rich.live import Live

from embedq.producer import failed
from embedq.producer.connection import connect, describe
from embedq.producer.errors import EmbedqError, QueueAccessError
from embedq.producer.fleet import FleetInfo, FleetReader
from embedq.producer.fleet_tables import open_console
from embedq.producer.rates import FleetRates
from embedq.producer.top_frame import Frame

#: Failed jobs of one queue whose codes are counted, and queues of which they are.
SAMPLE_FAILED, SAMPLE_QUEUES = 100, 8
#: Seconds for Redis to connect, and to answer: a server that hangs is to be seen as one.
REDIS_TIMEOUT_S = 3.0
#: Seconds between the two looks of which one picture is made.
ONCE_S = 1.0
REFRESHES_PER_S = 4.0


class FleetView:
    """Makes one frame after the other."""

    def __init__(self, client: redis.Redis) -> None:
        self._reader = FleetReader(client)
        self._rates = FleetRates()
        self._codes = FailureCodes(client)
        self.frame = Frame(describe(client))

    def look(self) -> None:
        """Raises QueueConnectionError; the frame is then as before."""
        seen = self._reader.look()
        self.frame = replace(
            self.frame,
            seen=seen,
            rates=self._rates.add(seen, time.monotonic()),
            codes=self._codes.count(seen),
            error=None,
            looked_at=time.time(),
        )

    def try_to_look(self) -> None:
        """A Redis that is away is shown as such. Raises QueueAccessError before the first look that succeeds."""
        try:
            self.look()
        except EmbedqError as err:
            if not err.retryable and self.frame.seen is None:
                raise
            self.frame = replace(self.frame, error=str(err))


class FailureCodes:
    """Error codes of the latest failed jobs, read again when there are others."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._numbers: dict[str, int] = {}
        self._codes: Mapping[str, int] | None = {}

    def count(self, seen: FleetInfo) -> Mapping[str, int] | None:
        """None where Redis' user may not look at jobs: then it is not asked again. Raises QueueConnectionError."""
        numbers = {queue.name: queue.failed for queue in seen.queues if queue.failed}
        if self._codes is None or numbers == self._numbers:
            return self._codes
        codes: Counter[str] = Counter()
        try:
            for name in sorted(numbers, key=numbers.__getitem__, reverse=True)[:SAMPLE_QUEUES]:
                codes.update(job.code for job in failed.latest(self._client, name, SAMPLE_FAILED))
        except QueueAccessError:
            self._codes = None
        else:
            self._numbers, self._codes = numbers, codes
        return self._codes


def run_top(url: str, interval_s: float, *, once: bool) -> None:
    """Until SIGTERM or Ctrl-C, or for one frame. Into a pipe frames go one below the other.

    Raises ConfigurationError, QueueAccessError, and with `once` QueueConnectionError.
    """
    console = open_console()
    with connect(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S) as client:
        view = FleetView(client)
        if once:
            view.look()
            time.sleep(min(interval_s, ONCE_S))
            view.look()
            _print(console, view.frame)
            return
        with _ending_quietly():
            if console.is_terminal:
                _show(console, view, interval_s)
            while True:
                view.try_to_look()
                _print(console, view.frame)
                time.sleep(interval_s)


def _show(console: Console, view: FleetView, interval_s: float) -> None:
    with Live(
        get_renderable=lambda: view.frame, console=console, screen=True, refresh_per_second=REFRESHES_PER_S
    ) as live:
        while True:
            view.try_to_look()
            live.refresh()
            time.sleep(interval_s)


def _print(console: Console, frame: Frame) -> None:
    console.print(replace(frame, is_endless=True))


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block, and nothing else: the terminal is left as it was."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)
