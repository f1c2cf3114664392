"""An event loop in a thread of its own, for callers that block. Knows nothing of what it runs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from embedq.producer.connection import closed
from embedq.producer.errors import ConfigurationError
from embedq.producer.tasks import stop

Result = TypeVar("Result")


class LoopThread:
    """Begins with the first call; ends with the process at the latest."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        #: of the process that the thread is in
        self._pid = 0
        self._is_closed = False

    def run(self, start: Callable[[], Awaitable[Result]]) -> Result:
        """The result of what it starts, or what that raises; if the caller is interrupted it is canceled.

        Raises QueueConnectionError once closed, and ConfigurationError in a process that was forked since.
        """
        if threading.current_thread() is self._thread:
            # A generator that nobody wants any more, collected in the loop's own thread, which cannot wait for itself.
            raise closed()
        # Under the lock: what `close` finds scheduled it ends.
        with self._lock:
            loop = self._running()
            future = asyncio.run_coroutine_threadsafe(_started(start), loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise closed() from None
        except BaseException:
            future.cancel()
            raise

    def close(self, clean_up: Callable[[], Awaitable[None]]) -> None:
        """Does this last. What still runs is canceled; calls that begin later raise QueueConnectionError."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or self._pid != os.getpid():
            return
        try:
            asyncio.run_coroutine_threadsafe(_end(clean_up), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(stop(asyncio.all_tasks(loop)))
            loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        """The lock is held."""
        if self._is_closed:
            raise closed()
        if self._loop is None:
            self._pid = os.getpid()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
            self._thread.start()
        elif self._pid != os.getpid():
            raise ConfigurationError("this queue was used before the process was forked; make one in each process")
        return self._loop


async def _started(start: Callable[[], Awaitable[Result]]) -> Result:
    return await start()


async def _end(clean_up: Callable[[], Awaitable[None]]) -> None:
    try:
        await clean_up()
    finally:
        await stop(asyncio.all_tasks() - {asyncio.current_task()})
        await asyncio.get_running_loop().shutdown_asyncgens()
