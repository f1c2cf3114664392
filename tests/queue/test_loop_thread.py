"""The event loop that blocking callers of several servers share."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
import time

import pytest

from embedq.producer import ConfigurationError, QueueConnectionError
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


def test_a_call_from_the_loops_own_thread_fails_instead_of_waiting_for_itself() -> None:
    thread = LoopThread("test")

    async def call() -> None:
        thread.run(nothing)

    with pytest.raises(QueueConnectionError, match="closed"):
        thread.run(call)
    thread.run(nothing)
    thread.close(nothing)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_to_make_its_own() -> None:
    thread = LoopThread("test")
    thread.run(nothing)
    if (child := os.fork()) == 0:
        try:
            thread.run(nothing)
        except ConfigurationError:
            thread.close(nothing)
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    thread.close(nothing)


def test_who_calls_while_it_closes_gets_a_result_or_an_error() -> None:
    for _ in range(20):
        thread = LoopThread("test")
        thread.run(nothing)
        ends: list[str] = []

        def call(thread: LoopThread = thread, ends: list[str] = ends) -> None:
            try:
                while True:
                    thread.run(nothing)
            except QueueConnectionError:
                ends.append("closed")

        callers = [threading.Thread(target=call, daemon=True) for _ in range(3)]
        for caller in callers:
            caller.start()
        thread.close(nothing)
        for caller in callers:
            caller.join(20)
        assert ends == 3 * ["closed"]
