"""The event loop that blocking callers of several servers share."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
import time

import pytest

from embedq.producer import QueueConnectionError
from embedq.producer.loop_thread import LoopThread


async def nothing() -> None:
    """Nobody leaves anything behind."""


def test_a_call_that_is_interrupted_is_canceled_in_the_loop() -> None:
    thread, canceled = LoopThread("test"), threading.Event()

    async def wait() -> None:
        main = threading.main_thread().ident
        assert main is not None
        asyncio.get_running_loop().call_later(0.1, signal.pthread_kill, main, signal.SIGINT)
        try:
            await asyncio.sleep(3600)
        finally:
            canceled.set()

    with pytest.raises(KeyboardInterrupt):
        thread.run(wait)
    assert canceled.wait(20)
    thread.close(nothing)


def test_closing_ends_calls_that_still_run() -> None:
    thread, began = LoopThread("test"), threading.Event()
    ends: list[BaseException] = []

    async def wait() -> None:
        began.set()
        await asyncio.sleep(3600)

    def call() -> None:
        try:
            thread.run(wait)
        except BaseException as err:
            ends.append(err)

    caller = threading.Thread(target=call)
    caller.start()
    assert began.wait(20)
    thread.close(nothing)
    caller.join(20)
    assert [type(err) for err in ends] == [QueueConnectionError]
    with pytest.raises(QueueConnectionError, match="closed"):
        thread.run(nothing)
    thread.close(nothing)


def test_a_thread_that_nobody_used_is_closed_at_once() -> None:
    before = time.monotonic()
    LoopThread("test").close(nothing)
    assert time.monotonic() - before < 5


def test_a_call_runs_in_the_callers_context() -> None:
    """So that the span around it is the parent of those of its jobs."""
    variable = contextvars.ContextVar("variable", default="nobody's")

    async def read() -> str:
        return variable.get()

    variable.set("the caller's")
    thread = LoopThread("test")
    assert thread.run(read) == "the caller's"
    thread.close(nothing)
