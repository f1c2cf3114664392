"""Other people's functions: what jobs name and the operator allows (RQ's callbacks), and RQ's exception handlers.

They run one after another on a thread of their own, never on one that a job waits for. A name that is not on the list
is neither called nor imported. Knows functions, names and time limits; what a job's end calls for is in `sequels`.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rq.utils import import_attribute

from embedq.producer.errors import ConfigurationError

logger = logging.getLogger("embedq.worker")

#: Callbacks that wait for the one under way.
QUEUE_CALLS = 100
#: Seconds for which a full queue may hold up whoever comes with another; then that one is dropped.
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Call:
    """One function that is due."""

    function: Callable[..., object]
    #: for the log: the callback app.hooks.done
    what: str
    #: made when its turn comes: a result is fetched no earlier
    arguments: Callable[[], tuple[Any, ...]]
    #: RQ's time limit; 0: none
    timeout_s: float


class CallbackOverranError(Exception):
    """Raised inside a callback whose time is over."""


class CallbackThread:
    """Runs what is submitted, from any thread. Raises ConfigurationError for a name on its list that is no function.

    A call that fails, overruns or finds no room is logged, and is not repeated.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._functions = {name: _load(name) for name in allowed}
        self._refused: dict[str, int] = {}
        self._calls: queue.Queue[Call | None] = queue.Queue(QUEUE_CALLS)
        self._is_jammed = False
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="embedq-callbacks", daemon=True)

    @property
    def refused(self) -> dict[str, int]:
        """How often each name came that is not on the list."""
        return dict(self._refused)

    def start(self) -> None:
        self._thread.start()

    def allowed(self, name: str) -> Callable[..., object] | None:
        """The function of that name, if it is on the list; others are counted, and each is logged once."""
        function = self._functions.get(name)
        if function is None:
            self._refuse(name)
        return function

    def submit(self, call: Call, patience_s: float = PATIENCE_S) -> None:
        """Puts a call at the end of the queue; waits for room at most so long, and not again while there is none."""
        try:
            self._calls.put(call, timeout=0 if self._is_jammed else patience_s)
            self._is_jammed = False
        except queue.Full:
            self._is_jammed = True
            self.num_dropped += 1
            logger.error("%s is not called: too many wait already", call.what)

    def close(self, timeout_s: float) -> None:
        """Ends the thread once the calls that wait are done, or leaves them undone after `timeout_s`."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + timeout_s
        try:
            self._calls.put(None, timeout=timeout_s)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            logger.error("callbacks were not done in %.1f s; up to %d are left", timeout_s, self._calls.qsize() + 1)

    def _refuse(self, name: str) -> None:
        """Anybody can make up names: no more of them are remembered than calls wait at most."""
        if name not in self._refused:
            if len(self._refused) == QUEUE_CALLS:
                return
            logger.warning("the callback %.100r is not called: --allow-callback does not name it", name)
        self._refused[name] = self._refused.get(name, 0) + 1

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                arguments = call.arguments()
                with TimeLimit(call.timeout_s, call.what):
                    call.function(*arguments)
            except CallbackOverranError:
                continue  # logged when its time was over
            except (Exception, SystemExit):
                logger.exception("%s failed", call.what)


class TimeLimit:
    """Raises CallbackOverranError in the block that outlasts it, and says so in the log.

    The exception comes between two steps of Python: what hangs in a system call goes on hanging, but the log tells.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._what = what
        self._thread_id = ctypes.c_ulong(threading.get_ident())
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._is_over = False

    def __enter__(self) -> None:
        if self._seconds > 0:
            self._timer.start()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_over = True
            # Takes back an exception that has not come yet: it would hit whatever follows the block.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread_id, None)

    def _end(self) -> None:
        with self._lock:
            if not self._is_over:
                logger.error("%s is not done within %g s; it is interrupted", self._what, self._seconds)
                exception = ctypes.py_object(CallbackOverranError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread_id, exception)


def _load(name: str) -> Callable[..., Any]:
    try:
        function = import_attribute(name)
    except Exception as err:
        reason = " ".join(str(err).split())
        raise ConfigurationError(f"the callback {name} cannot be imported: {reason or type(err).__name__}") from err
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"the callback {name} is not a plain function")
    return function
