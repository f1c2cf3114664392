"""The thread of chores: in their order, each by itself, and never in anybody's way."""

from __future__ import annotations

import threading
import time

import pytest
import redis

from embedq.worker import chores
from embedq.worker.chores import Chores
from tests.conftest import until


def test_what_fails_keeps_nothing_else_from_being_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fail(err: Exception) -> None:
        raise err

    work = Chores(lambda: done.append("tick"))
    for chore in (lambda: fail(redis.ConnectionError("away")), lambda: fail(KeyError("x")), lambda: done.append("it")):
        work.submit(chore)
    work.start()
    until(lambda: {"it", "tick"} <= set(done))
    work.stop()
    assert [record.exc_info is not None for record in caplog.records] == [False, True]
    assert not any(thread.name == "embedq-chores" for thread in threading.enumerate())


def test_the_end_waits_for_a_chore_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "PATIENCE_S", 0.2)
    let_go = threading.Event()
    work = Chores(lambda: let_go.wait(20))
    work.start()
    began_at = time.monotonic()
    work.stop()
    assert time.monotonic() - began_at < 5
    let_go.set()
