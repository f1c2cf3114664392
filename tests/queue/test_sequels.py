"""What follows a job's end: dependents, repetitions, rate limits, and callbacks that the operator allows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from rq import Callback, Queue, Repeat
from rq.job import Job
from rq.rate_limit import RateLimit

from embedq.producer import ConfigurationError, EmbedQueue, EmbedSerializer, JobFailedError, keys
from embedq.producer.connection import connect
from embedq.worker import EmbedWorker, WorkerSettings, callbacks, cli, sequels
from embedq.worker.callbacks import Call, CallbackThread, TimeLimit
from embedq.worker.sequels import Sequels
from tests.conftest import Drain, until
from tests.queue.test_worker import Start, start  # noqa: F401

HERE = "tests.queue.test_sequels"
#: What the callbacks below were called with.
called: list[tuple[Any, ...]] = []
#: What `waiting` waits for.
GATE = threading.Event()


def note(*arguments: Any) -> None:
    called.append(arguments)


def broken(*_: Any) -> None:
    raise SystemExit("broken")


def waiting(*arguments: Any) -> None:
    GATE.wait(20)
    note(*arguments)


def busy(*_: Any) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pass
    note("not interrupted")


async def coroutine(*_: Any) -> None:
    raise AssertionError


@pytest.fixture(autouse=True)
def no_calls() -> None:
    called.clear()
    GATE.clear()


@pytest.fixture
def theirs(queue: EmbedQueue) -> Queue:
    return Queue("embed", connection=queue._client, serializer=EmbedSerializer)


@pytest.fixture
def thread() -> Iterator[CallbackThread]:
    thread = CallbackThread([])
    thread.start()
    yield thread
    GATE.set()
    thread.close(20)


def enqueue(theirs: Queue, *, texts: tuple[str, ...] = ("a",), dimensions: int | None = None, **options: Any) -> Job:
    kwargs: dict[str, Any] = {"texts": list(texts)}
    if dimensions is not None:
        kwargs["dimensions"] = dimensions
    return theirs.enqueue("embedq.worker.tasks.embed", kwargs=kwargs, **options)


def call(name: str, *arguments: Any, timeout_s: float = 60) -> Call:
    return Call(globals()[name], f"the callback {name} of job-1", lambda: arguments, timeout_s)


# --- callbacks of jobs


def test_an_allowed_success_callback_gets_job_connection_and_result(
    theirs: Queue, queue: EmbedQueue, drain: Drain
) -> None:
    job = enqueue(theirs, texts=("a", "b"), on_success=Callback(f"{HERE}.note"))
    drain(allow_callbacks=(f"{HERE}.note",))
    [(seen, connection, result)] = called
    assert (seen.id, seen.get_status()) == (job.id, "finished")
    assert connection.get("nothing") is None
    assert result.vectors.tolist() == queue.result(job.id).vectors.tolist()


def test_an_allowed_failure_callback_gets_the_error_once_retries_are_used_up(
    theirs: Queue, queue: EmbedQueue, drain: Drain
) -> None:
    job = enqueue(theirs, dimensions=99, on_failure=Callback(f"{HERE}.note"), on_success=Callback(f"{HERE}.note"))
    drain(allow_callbacks=(f"{HERE}.note",))
    [(seen, _, kind, failure, traceback)] = called
    assert (seen.id, kind, failure.code, traceback) == (job.id, JobFailedError, "unsupported_option", None)
    with pytest.raises(JobFailedError) as caught:
        queue.result(job.id)
    assert str(caught.value) == str(failure)


def test_a_result_that_nobody_keeps_still_reaches_the_callback(theirs: Queue, drain: Drain) -> None:
    enqueue(theirs, result_ttl=0, on_success=Callback(f"{HERE}.note"))
    drain(allow_callbacks=(f"{HERE}.note",))
    [(_, _, result)] = called
    assert len(result) == 1


def test_a_name_that_is_not_allowed_is_not_imported_and_said_once(
    theirs: Queue, drain: Drain, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [enqueue(theirs, on_success=Callback("tests.queue.no_such_module.f")) for _ in range(3)]
    with caplog.at_level(logging.WARNING, "embedq.worker"):
        worker = drain(allow_callbacks=(f"{HERE}.note",))
    assert [job.get_status() for job in jobs] == ["finished"] * 3
    assert worker.callbacks.refused == {"tests.queue.no_such_module.f": 3}
    assert len([line for line in caplog.messages if "no_such_module" in line]) == 1
    assert called == []


def test_an_abandoned_job_calls_its_failure_callback(theirs: Queue, queue: EmbedQueue, drain: Drain) -> None:
    job = enqueue(theirs, on_failure=Callback(f"{HERE}.note"))
    queue._redis.lrem(keys.queue("embed"), 0, job.id)
    queue._redis.hset(keys.job(job.id), "status", "started")
    queue._redis.zadd(keys.started("embed"), {f"{job.id}:0123": 1})
    until(lambda: drain(allow_callbacks=(f"{HERE}.note",)) and called)
    [(seen, _, _, failure, _)] = called
    assert (seen.id, failure.code) == (job.id, JobFailedError.ABANDONED)


def test_jobs_with_empty_callback_fields_have_no_sequel(
    theirs: Queue, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ writes the fields empty."""
    followed: list[str] = []
    monkeypatch.setattr(Sequels, "follow", lambda _self, _queue, job_id, **_: followed.append(job_id))
    plain, named = enqueue(theirs), enqueue(theirs, on_success=Callback("a.b"))
    drain()
    assert plain.get_status() == "finished"
    assert followed == [named.id]


def test_exception_handlers_hear_of_every_failed_attempt(queue: EmbedQueue, url: str) -> None:
    bad, good = queue.enqueue("a", dimensions=99), queue.enqueue("b")
    settings = WorkerSettings(model="noop:8")
    with connect(url) as client:
        EmbedWorker(["embed"], connection=client, settings=settings, exception_handlers=[note]).work(burst=True)
    [(job, kind, failure, traceback)] = called
    assert (job.id, kind, failure.code, traceback) == (bad.id, JobFailedError, "unsupported_option", None)
    assert good.result().num_tokens == (3,)


# --- their thread


def test_callbacks_are_called_in_order_and_before_the_thread_ends(thread: CallbackThread) -> None:
    for number in range(50):
        thread.submit(call("note", number))
    thread.close(20)
    assert called == [(number,) for number in range(50)]


def test_a_callback_that_raises_is_logged_and_the_next_one_called(
    thread: CallbackThread, caplog: pytest.LogCaptureFixture
) -> None:
    thread.submit(call("broken"))
    thread.submit(Call(note, "another", lambda: (1 // 0,), 60))  # no arguments to be had
    thread.submit(call("note", "after"))
    until(lambda: called == [("after",)])
    assert "the callback broken of job-1 failed" in caplog.messages
    assert "another failed" in caplog.messages


def test_a_callback_that_overruns_is_interrupted_and_logged(
    thread: CallbackThread, caplog: pytest.LogCaptureFixture
) -> None:
    thread.submit(call("busy", timeout_s=0.2))
    thread.submit(call("note", "after"))
    until(lambda: called == [("after",)])
    assert "the callback busy of job-1 is not done within 0.2 s; it is interrupted" in caplog.messages


def test_a_jam_costs_patience_once_and_then_drops(thread: CallbackThread, caplog: pytest.LogCaptureFixture) -> None:
    began_at = time.monotonic()
    for number in range(1 + callbacks.QUEUE_CALLS + 20):
        thread.submit(call("waiting", number, timeout_s=0), patience_s=0.5)
    assert 0.5 <= time.monotonic() - began_at < 5
    assert 19 <= thread.num_dropped <= 20  # the first may wait in the queue still
    assert sum("too many wait already" in line for line in caplog.messages) == thread.num_dropped
    GATE.set()
    until(lambda: len(called) == 1 + callbacks.QUEUE_CALLS + 20 - thread.num_dropped)
    thread.submit(call("note", "after"))
    until(lambda: called[-1] == ("after",))


def test_leaving_does_not_wait_for_a_callback_that_hangs(
    thread: CallbackThread, caplog: pytest.LogCaptureFixture
) -> None:
    thread.submit(call("waiting", timeout_s=0))
    began_at = time.monotonic()
    thread.close(0.2)
    assert time.monotonic() - began_at < 5
    assert any(line.startswith("callbacks were not done in 0.2 s") for line in caplog.messages)


def test_a_time_limit_that_is_kept_raises_nothing_afterwards() -> None:
    for _ in range(200):
        limit = TimeLimit(0.0005, "a short block")
        try:
            with limit:
                time.sleep(0.0005)
        except callbacks.CallbackOverranError:
            continue
        for _ in range(100):
            assert limit is not None


@pytest.mark.parametrize("name", ["no_such", "coroutine", "called", "no_such.deeper"])
def test_a_callback_that_cannot_be_called_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the callback {HERE}.{name} "):
        CallbackThread([f"{HERE}.{name}"])


def test_a_worker_with_a_callback_that_is_not_there_says_so_in_one_line(start: Start) -> None:  # noqa: F811
    status, output = start("--allow-callback", "no.such.function").ended()
    assert status == 2
    assert (
        output == "error: the callback no.such.function cannot be imported: Invalid attribute name: no.such.function\n"
    )


# --- settings


def test_allowed_callbacks_come_from_flags_or_the_environment() -> None:
    names = ("app.hooks.done", "app.hooks.failed")
    assert WorkerSettings.from_environment({"EMBEDQ_ALLOW_CALLBACKS": " app.hooks.done, app.hooks.failed,"}) == (
        WorkerSettings(allow_callbacks=names)
    )
    flags = [part for name in names for part in ("--allow-callback", name)]
    for arguments, variable in ((flags, None), ([], ", ".join(names))):
        with CliRunner().isolation(env={"EMBEDQ_ALLOW_CALLBACKS": variable}):
            parsed = cli.worker.make_context("worker", list(arguments)).params
        assert parsed["allow_callbacks"] == names


@pytest.mark.parametrize("name", ["print", "os.", "os.path;x", "", "a b.c"])
def test_a_callback_without_a_dotted_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="allow_callbacks must be dotted names"):
        WorkerSettings(allow_callbacks=(name,))


# --- repetitions


@pytest.mark.parametrize("result_ttl", [500, 0])
def test_a_job_repeats_as_often_as_it_asks(theirs: Queue, queue: EmbedQueue, drain: Drain, result_ttl: int) -> None:
    job = enqueue(theirs, repeat=Repeat(times=2), result_ttl=result_ttl, on_success=Callback(f"{HERE}.note"))
    worker = drain(allow_callbacks=(f"{HERE}.note",))
    assert worker.successful_job_count == 3
    assert job.get_status() == "finished"
    assert queue._redis.hget(keys.job(job.id), "repeats_left") == b"0"
    assert queue._redis.xlen(keys.results(job.id)) == 3
    assert queue._redis.zscore(keys.finished("embed"), job.id) is not None
    assert len(called) == 3


def test_a_job_repeats_after_its_intervals(theirs: Queue, queue: EmbedQueue, drain: Drain) -> None:
    job = enqueue(theirs, repeat=Repeat(times=3, interval=[600, 1200]))
    for interval in (600, 1200, 1200):
        drain()
        assert job.get_status() == "scheduled"
        server_now = queue._redis.time()[0]
        assert queue._redis.zscore(keys.scheduled("embed"), job.id) == pytest.approx(server_now + interval, abs=5)
        assert queue._redis.ttl(keys.job(job.id)) == -1
        assert queue._redis.zcard(keys.finished("embed")) == 0
        queue._redis.zrem(keys.scheduled("embed"), job.id)
        queue._redis.hset(keys.job(job.id), "status", "queued")
        queue._redis.rpush(keys.queue("embed"), job.id)
    drain()
    assert job.get_status() == "finished"


def test_following_a_job_twice_repeats_it_once(each_url: str, drain: Drain) -> None:
    with EmbedQueue(each_url) as queue:
        theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
        job = enqueue(theirs, repeat=Repeat(times=5))
        drain(at=each_url, max_jobs=1)
        thread = CallbackThread([])
        Sequels(queue._client, ["embed"], thread).follow("embed", job.id)
        assert queue._redis.lrange(keys.queue("embed"), 0, -1) == [job.id.encode()]
        assert queue._redis.hget(keys.job(job.id), "repeats_left") == b"4"


def test_a_failed_job_does_not_repeat(theirs: Queue, drain: Drain) -> None:
    job = enqueue(theirs, dimensions=99, repeat=Repeat(times=2))
    assert drain().failed_job_count == 1
    assert job.get_status() == "failed"


def test_a_job_that_repeats_at_once_keeps_its_slot_and_frees_it_at_the_end(
    theirs: Queue, queue: EmbedQueue, drain: Drain
) -> None:
    limit = RateLimit("slots", concurrency=1)
    first = enqueue(theirs, repeat=Repeat(times=1), rate_limit=limit)
    second = enqueue(theirs, rate_limit=limit)
    drain(max_jobs=1)
    assert (first.get_status(), second.get_status()) == ("queued", "rate_limited")
    drain()
    assert (first.get_status(), second.get_status()) == ("finished", "finished")
    assert queue._redis.xlen(keys.results(first.id)) == 2


def test_a_job_that_vanished_has_no_sequel(queue: EmbedQueue, caplog: pytest.LogCaptureFixture) -> None:
    Sequels(queue._client, ["embed"], CallbackThread([])).follow_all("embed", ["gone", "gone-too"])
    assert caplog.messages == []


# --- workers that die in between


@pytest.fixture
def left_undone(each_url: str, drain: Drain, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EmbedQueue, Job, Job]]:
    """A finished job and one that waits for it: the worker died before it could do what follows."""
    with EmbedQueue(each_url) as queue:
        theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
        first = enqueue(theirs, result_ttl=0)
        second = enqueue(theirs, depends_on=first)
        with monkeypatch.context() as patch:
            patch.setattr(Sequels, "follow", lambda *_, **__: None)
            drain(at=each_url)
        assert (first.get_status(), second.get_status()) == ("finished", "deferred")
        yield queue, first, second


def test_what_a_dead_worker_left_undone_is_taken_up(left_undone: tuple[EmbedQueue, Job, Job]) -> None:
    queue, first, second = left_undone
    assert queue._redis.zrange(keys.sequels("embed"), 0, -1) == [first.id.encode()]
    Sequels(queue._client, ["other", "embed"], CallbackThread([])).take_up()
    assert second.get_status() == "deferred"  # its worker may still live
    queue._redis.zincrby(keys.sequels("embed"), -sequels.ORPHANED_S, first.id)
    Sequels(queue._client, ["other"], CallbackThread([])).take_up()
    assert second.get_status() == "deferred"
    Sequels(queue._client, ["other", "embed"], CallbackThread([])).take_up()
    assert second.get_status() == "queued"
    assert not queue._redis.exists(keys.sequels("embed"))


def test_a_dependent_that_rq_left_between_its_two_steps_is_enqueued(left_undone: tuple[EmbedQueue, Job, Job]) -> None:
    queue, first, second = left_undone
    Queue("embed", connection=queue._client, serializer=EmbedSerializer).move_dependents_to_ready(first)
    # The connection broke here, and the same call again finds no dependents.
    Sequels(queue._client, ["embed"], CallbackThread([])).follow("embed", first.id)
    assert second.get_status() == "ready_to_enqueue"
    assert not queue._redis.exists(keys.sequels("embed"))
    Sequels(queue._client, ["other", "embed"], CallbackThread([])).take_up()
    assert second.get_status() == "queued"
    assert queue._redis.lrange(keys.queue("embed"), 0, -1) == [second.id.encode()]


def test_a_job_is_canceled_between_rqs_two_steps(left_undone: tuple[EmbedQueue, Job, Job]) -> None:
    queue, first, second = left_undone
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    theirs.move_dependents_to_ready(first)
    assert queue.cancel(second.id) is True
    assert theirs.ready_job_registry.count == 0
    Sequels(queue._client, ["embed"], CallbackThread([])).take_up()
    assert (second.get_status(), queue.depth()) == ("canceled", 0)


def test_what_is_left_undone_is_taken_up_by_one_worker(left_undone: tuple[EmbedQueue, Job, Job]) -> None:
    queue, first, _ = left_undone
    queue._redis.zincrby(keys.sequels("embed"), -sequels.ORPHANED_S, first.id)
    one, other = (Sequels(queue._client, ["embed"], CallbackThread([])) for _ in range(2))
    assert one._orphans(keys=[keys.sequels("embed")], args=[sequels.ORPHANED_S, 10]) == [1, first.id.encode()]
    assert other._orphans(keys=[keys.sequels("embed")], args=[sequels.ORPHANED_S, 10]) == []


def test_a_job_that_is_gone_is_not_looked_for_again(left_undone: tuple[EmbedQueue, Job, Job]) -> None:
    queue, first, _ = left_undone
    queue._redis.zincrby(keys.sequels("embed"), -sequels.ORPHANED_S, first.id)
    queue._redis.delete(keys.job(first.id))
    Sequels(queue._client, ["embed"], CallbackThread([])).take_up()
    assert not queue._redis.exists(keys.sequels("embed"))


def test_a_worker_looks_for_what_others_left_every_few_seconds(
    left_undone: tuple[EmbedQueue, Job, Job], each_url: str, drain: Drain
) -> None:
    queue, first, second = left_undone
    queue._redis.zincrby(keys.sequels("embed"), -sequels.ORPHANED_S, first.id)
    until(lambda: drain(at=each_url) and second.get_status() == "finished")
