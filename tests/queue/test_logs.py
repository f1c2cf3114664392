"""What a worker's log says, and how much of it: fields, micro-batches by the second, floods of warnings."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from embedq.producer import EmbedQueue
from embedq.worker.telemetry import logs
from embedq.worker.telemetry.batch_log import BatchLog
from embedq.worker.telemetry.log_limits import MAX_ALIKE, MAX_KINDS, WINDOW_S, LimitedHandler
from tests.conftest import Drain, until
from tests.queue.test_rq import rq_command

logger = logging.getLogger("embedq.worker")

#: Puts the clock forward by so many seconds.
Pass = Callable[[float], None]


@pytest.fixture
def pass_s(monkeypatch: pytest.MonkeyPatch) -> Pass:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


class Shown:
    """Lines of a handler of ours on a logger of its own."""

    def __init__(self, log_format: Any = "text") -> None:
        self.stream = io.StringIO()
        self.handler = LimitedHandler()
        self.handler.setStream(self.stream)
        self.handler.setFormatter(
            logs.JsonFormatter("w1") if log_format == "json" else logs.LineFormatter("%(message)s")
        )
        self.logger = logging.Logger("embedq.test", logging.INFO)
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What would be done at the ends of windows."""
    due: list[Callable[[], None]] = []

    class Timer:
        def __init__(self, _seconds: float, action: Callable[..., None], args: tuple[Any, ...]) -> None:
            self._action, self._args = action, args

        def start(self) -> None:
            due.append(lambda: self._action(*self._args))

    monkeypatch.setattr(threading, "Timer", Timer)
    return due


# --- floods


def test_of_a_flood_of_warnings_the_first_are_shown_and_the_rest_counted(
    pass_s: Pass, timers: list[Callable[[], None]]
) -> None:
    shown = Shown()
    for number in range(1239):
        shown.logger.warning("failed jobs: %d, code %s", number, "too_long", extra={"jobs": 2, "code": "too_long"})
    assert shown.lines == [f"failed jobs: {number}, code too_long" for number in range(MAX_ALIKE)]
    assert len(timers) == 1
    pass_s(WINDOW_S)
    timers.pop()()
    assert shown.lines[MAX_ALIKE:] == [
        "... 1,234 more like this in the last 60 s, 2,468 jobs; the last: failed jobs: 1238, code too_long"
    ]
    # What comes then is shown at once again.
    shown.logger.warning("failed jobs: %d, code %s", 7, "too_long", extra={"jobs": 2, "code": "too_long"})
    assert shown.lines[-1] == "failed jobs: 7, code too_long"


def test_other_lines_get_through_a_flood(pass_s: Pass, timers: list[Callable[[], None]]) -> None:
    shown = Shown()
    for _ in range(100):
        shown.logger.warning("failed jobs: %d", 1, extra={"code": "a"})
    shown.logger.warning("failed jobs: %d", 2, extra={"code": "b"})
    shown.logger.error("failed jobs: %d", 3, extra={"code": "a"})
    shown.logger.warning("something else")
    for number in range(100):
        shown.logger.info("batch %d", number)
    assert shown.lines[MAX_ALIKE : MAX_ALIKE + 3] == ["failed jobs: 2", "failed jobs: 3", "something else"]
    assert len(shown.lines) == MAX_ALIKE + 3 + 100


def test_a_warning_now_and_then_is_never_held_back(pass_s: Pass, timers: list[Callable[[], None]]) -> None:
    shown = Shown()
    for number in range(50):
        shown.logger.warning("number %d", number)
        pass_s(WINDOW_S / MAX_ALIKE)
    assert len(shown.lines) == 50
    assert timers == []


def test_what_is_held_back_is_told_when_the_log_is_closed(pass_s: Pass, timers: list[Callable[[], None]]) -> None:
    shown = Shown()
    for number in range(8):
        shown.logger.error("number %d", number)
    pass_s(3)
    shown.handler.close()
    assert shown.lines[-1] == "... 3 more like this in the last 3 s; the last: number 7"
    timers.pop()()  # one that comes too late has nothing to tell
    assert len(shown.lines) == MAX_ALIKE + 1


def test_the_rest_of_a_flood_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq.worker.telemetry.log_limits.WINDOW_S", 0.2)
    shown = Shown()
    for number in range(10):
        shown.logger.warning("number %d", number)
    until(lambda: shown.lines[-1].startswith("... 5 more like this"))


def test_no_line_is_lost_or_counted_twice_among_threads() -> None:
    shown = Shown()

    def flood() -> None:
        for _ in range(500):
            shown.logger.warning("again", extra={"jobs": 1})

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown.handler.close()
    assert shown.lines.count("again") == MAX_ALIKE
    assert shown.lines[-1].startswith(f"... {2000 - MAX_ALIKE:,} more like this")


def test_what_is_held_back_keeps_no_error_alive(pass_s: Pass, timers: list[Callable[[], None]]) -> None:
    shown = Shown()
    for _ in range(MAX_ALIKE + 1):
        try:
            raise ValueError("full")
        except ValueError as err:
            shown.logger.error("failed: %s", err, exc_info=True)
    [window] = shown.handler._windows.values()
    assert window.last is not None
    assert (window.last.args, window.last.exc_info) == (None, None)


def test_messages_that_are_all_different_fill_no_memory(pass_s: Pass, timers: list[Callable[[], None]]) -> None:
    shown = Shown()
    for number in range(3 * MAX_KINDS):
        shown.logger.warning(f"from a library: {number}")
    assert len(shown.handler._windows) == MAX_KINDS
    assert len(shown.lines) == 3 * MAX_KINDS
    pass_s(WINDOW_S)
    shown.logger.warning("one more")
    assert len(shown.handler._windows) == 1


# --- fields


def test_json_lines_have_fields_by_stable_names_and_no_others() -> None:
    shown = Shown("json")
    fields = {"event": "failed_jobs", "jobs": 2, "code": "too_long", "password": "secret"}
    shown.logger.warning("failed jobs: %d", 2, extra=fields)
    [line] = shown.objects
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "embedq.test",
        "message": "failed jobs: 2",
        "worker": "w1",
        "event": "failed_jobs",
        "jobs": 2,
        "code": "too_long",
    }


def test_a_json_line_that_stands_for_others_says_how_many(pass_s: Pass, timers: list[Callable[[], None]]) -> None:
    shown = Shown("json")
    for _ in range(MAX_ALIKE + 4):
        shown.logger.warning("failed", extra={"jobs": 3, "code": "hung"})
    shown.handler.close()
    last = shown.objects[-1]
    assert (last["repeats"], last["jobs"], last["code"]) == (4, 12, "hung")


def test_a_json_line_names_the_span_in_which_it_is_written() -> None:
    shown = Shown("json")
    with TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("work") as span:
        shown.logger.info("within")
    shown.logger.info("without")
    within, without = shown.objects
    assert int(within["trace_id"], 16) == span.get_span_context().trace_id
    assert int(within["span_id"], 16) == span.get_span_context().span_id
    assert "trace_id" not in without


def test_the_process_configures_its_log_once_and_closes_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging; from embedq.worker.telemetry import logs\n"
        "logs.configure('text'); logs.configure('json', worker='w1')\n"
        "logger = logging.getLogger('embedq.worker')\n"
        "for n in range(9): logger.error('number %d', n)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in shown.stderr.splitlines()]
    assert [line.get("repeats") for line in lines] == [*(MAX_ALIKE * [None]), 4]
    assert {line["worker"] for line in lines} == {"w1"}


def test_rq_worker_with_our_class_writes_our_lines_in_the_format_that_the_environment_names(
    queue: EmbedQueue, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDQ_LOG_FORMAT", "json")
    monkeypatch.setenv("EMBEDQ_MODEL", "noop:8")
    queue.enqueue("a text")
    shown = rq_command(url, "worker", "--burst", "--worker-class", "embedq.worker.EmbedWorker", "--name", "w7", "embed")
    ours = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert {"serving", "micro_batches", "stopping"} <= {line.get("event") for line in ours}
    assert {line["worker"] for line in ours} == {"w7"}


# --- micro-batches


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[logging.LogRecord]]]:
    with caplog.at_level(logging.DEBUG, logger="embedq.worker"):
        yield lambda: [record for record in caplog.records if record.levelno == logging.INFO]


def test_micro_batches_make_one_line_a_second_however_many_there_are(
    pass_s: Pass, info: Callable[[], list[logging.LogRecord]], caplog: pytest.LogCaptureFixture
) -> None:
    log = BatchLog(max_batch_tokens=100)
    for _ in range(400):
        log.add(10, 5, 50, 0.001)
        pass_s(1 / 128)
    log.tell()
    told = [(record.__dict__["batches"], record.__dict__["texts"]) for record in info()]
    assert told[0] == (1, 10)
    assert len(told) == 5
    assert [sum(column) for column in zip(*told, strict=True)] == [400, 4000]
    assert info()[1].getMessage() == (
        "128 micro-batches in 1.0 s: 1280 texts, 6400 tokens, 50000 tokens/s while encoding, 50 % full"
    )
    assert sum(record.levelno == logging.DEBUG for record in caplog.records) == 400


def test_a_micro_batch_after_a_quiet_second_is_told_at_once_and_the_last_ones_soon(
    pass_s: Pass, info: Callable[[], list[logging.LogRecord]]
) -> None:
    log = BatchLog(max_batch_tokens=100)
    log.add(2, 1, 20, 0.012)
    assert [record.getMessage() for record in info()] == ["micro-batch: 2 texts of 1 jobs, 20 tokens, 12 ms"]
    log.add(3, 1, 30, 0.012)
    log.tick()
    assert len(info()) == 1
    pass_s(1)
    log.tick()
    log.tick()
    assert [record.getMessage() for record in info()][1:] == ["micro-batch: 3 texts of 1 jobs, 30 tokens, 12 ms"]


def test_a_worker_tells_of_all_its_micro_batches_before_it_stops(
    queue: EmbedQueue, drain: Drain, info: Callable[[], list[logging.LogRecord]]
) -> None:
    queue.enqueue_many(["some words of a text"] * 50)
    drain(max_batch_tokens=20)
    told = [record.__dict__ for record in info() if record.__dict__.get("event") == "micro_batches"]
    assert sum(fields["texts"] for fields in told) == 50
    assert sum(fields["batches"] for fields in told) > len(told)


def test_no_job_id_stands_above_debug(queue: EmbedQueue, drain: Drain, caplog: pytest.LogCaptureFixture) -> None:
    jobs = [queue.enqueue("a text", model="another"), queue.enqueue("a text")]
    with caplog.at_level(logging.DEBUG):
        drain()
    above = "\n".join(record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG)
    assert "failed jobs: 1, code wrong_model" in above
    assert not [job.id for job in jobs if job.id in above]
    assert jobs[0].id in caplog.text
