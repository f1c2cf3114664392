"""How a worker starts: it waits for a Redis that cannot serve yet, and leaves at once if it is told to meanwhile.

Knows back-off and signals; knows neither model nor jobs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

import redis

from embedq.producer.connection import describe, is_passing, translate

logger = logging.getLogger("embedq.worker")

T = TypeVar("T")

#: Seconds between attempts to reach a Redis that cannot serve: the first, and the longest.
RECONNECT_FIRST_S, RECONNECT_LONGEST_S = 0.5, 10.0
#: Seconds for which Python may go on after a signal: libraries' own code, in which no handler runs, may take longer.
UNWIND_S = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def until_served(
    client: redis.Redis,
    action: Callable[[], T],
    timeout_s: float | None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Calls until Redis serves, however long that takes where `timeout_s` is None, and says so on a line each time.

    Each attempt connects anew, so that a name which leads to another server by now is followed. Raises redis-py's
    error at once where waiting cannot help (credentials, certificates), and after the timeout.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    pause_s = RECONNECT_FIRST_S
    while True:
        try:
            return action()
        except redis.RedisError as err:
            left_s = deadline - time.monotonic()
            if not is_passing(err) or left_s <= 0:
                raise
            pause_s = min(pause_s, left_s)
            logger.warning("waiting for Redis, next attempt in %.1f s: %s", pause_s, translate(err, describe(client)))
        sleep(pause_s)
        pause_s = min(2 * pause_s, RECONNECT_LONGEST_S)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C end the process: by an exception, so that what is begun is undone, and by
    force if that takes too long.

    Also as process 1 of a container, for which the system has no default action. For the main thread; whoever installs
    handlers of its own inside takes over. In a block within a block nothing more happens.
    """
    if signal.getsignal(signal.SIGTERM) is _leave:
        yield
        return
    before = {number: signal.signal(number, _leave) for number in _SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_force, args=(reader,), name="embedq-startup", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


def _force(reader: int) -> None:
    """Reads the numbers of signals, which Python writes at once whatever the main thread is in the middle of."""
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if _is_leaving_by(number[0]):
                time.sleep(UNWIND_S)
                if _is_leaving_by(number[0]):
                    os._exit(128 + number[0])


def _is_leaving_by(signum: int) -> bool:
    return signum in _SIGNALS and signal.getsignal(signum) is _leave
