"""Commands on a worker's channel: RQ's and ours, what they do to jobs in hand, and what nonsense does not do."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Callback, Queue, Retry
from rq.command import send_command, send_kill_horse_command, send_stop_execution_command, send_stop_job_command
from rq.job import Job
from rq.rate_limit import RateLimit

from embedq.producer import EmbedQueue, EmbedSerializer, JobCanceledError, JobFailedError, JobStatus, keys
from embedq.producer.connection import connect
from embedq.worker import EmbedWorker
from embedq.worker.callbacks import CallbackThread
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.commands import MAX_MESSAGE_BYTES, CommandHandler, survive
from embedq.worker.interruptions import Interruptions
from embedq.worker.leases import LeaseKeeper
from embedq.worker.sequels import Sequels
from tests.conftest import until
from tests.queue.test_worker import Start, hanging_device, idle_workers, start  # noqa: F401

EMBED = "embedq.worker.tasks.embed"
MANY = 10**9
CALLED: list[tuple[Any, ...]] = []


def note(*arguments: Any) -> None:
    CALLED.append(arguments)


@pytest.fixture
def queue(each_url: str) -> Iterator[EmbedQueue]:
    with EmbedQueue(each_url) as client:
        yield client


class InHand:
    """A worker's parts around the channel, without its loop."""

    def __init__(self, client: redis.Redis) -> None:
        self.store = ClaimStore(client, "w1", 30)
        self.callbacks = CallbackThread([f"{__name__}.note"])
        self.callbacks.start()
        sequels = Sequels(client, ["embed"], self.callbacks)
        self.leases = LeaseKeeper(self.store, ["embed"], 60, on_abandoned=sequels.follow_all, on_forgotten=lambda: None)
        self.interruptions = Interruptions(client, "w1", self.leases, sequels)

    def claim(self) -> list[Claim]:
        claims = self.store.claim(["embed"], 100, MANY).claims
        self.leases.hold(claims)
        return claims


@pytest.fixture
def hand(queue: EmbedQueue) -> Iterator[InHand]:
    CALLED.clear()
    hand = InHand(queue._client)
    yield hand
    hand.callbacks.close(20)


def theirs(queue: EmbedQueue, **options: Any) -> Job:
    client = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    return client.enqueue(EMBED, kwargs={"texts": ["a"]}, **options)


def leftovers(queue: EmbedQueue) -> set[str]:
    """Keys of executions; a job that has ended leaves none."""
    return {key.decode() for key in queue._redis.keys("*execution*")} | {
        entry.decode() for entry in queue._redis.zrange(keys.started("embed"), 0, -1)
    }


# --- payloads


@pytest.fixture
def heard() -> list[Any]:
    return []


@pytest.fixture
def handler(heard: list[Any]) -> CommandHandler:
    return CommandHandler(
        on_shutdown=lambda: heard.append("shutdown"),
        on_stop=lambda job_id, execution_id: heard.append((job_id, execution_id)),
        on_cancel=lambda job_id: heard.append(f"cancel {job_id}"),
    )


def test_each_command_calls_what_it_is_for(handler: CommandHandler, heard: list[Any]) -> None:
    for payload in (
        {"command": "shutdown"},
        {"command": "stop-job", "job_id": "j"},
        {"command": "stop-execution", "job_id": "j", "execution_id": "e"},
        {"command": "kill-horse"},
    ):
        handler.handle({"data": json.dumps(payload).encode()})
    handler.handle_cancel({"data": b"j"})
    assert heard == ["shutdown", ("j", None), ("j", "e"), "cancel j"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"command": ["shutdown"]}',
        b'{"command": "stop-job"}',
        b'{"command": "stop-job", "job_id": 3}',
        b'{"command": "stop-execution", "job_id": "j"}',
        b'{"command": "embedq-cancel", "job_id": "j"}',
        b'{"command": "format-disk"}',
        b"[" * 100_000,
        1,
        None,
    ],
)
def test_nonsense_on_the_channel_is_logged_without_its_text(
    handler: CommandHandler, heard: list[Any], caplog: pytest.LogCaptureFixture, data: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        handler.handle({"data": data})
    assert heard == []
    [line] = caplog.messages
    assert "command on this worker's channel" in line
    assert "disk" not in line


def test_a_message_longer_than_any_command_is_not_even_parsed(
    handler: CommandHandler, heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    long = b'{"command": "shutdown"' + b" " * MAX_MESSAGE_BYTES + b"}"
    with caplog.at_level(logging.WARNING):
        handler.handle({"data": long})
        handler.handle_cancel({"data": b"j" * (MAX_MESSAGE_BYTES + 1)})
    assert heard == []
    assert len(caplog.messages) == 2


def test_a_command_that_fails_does_not_end_the_thread_that_reads(
    heard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise redis.ConnectionError("away")

    CommandHandler(fail, fail, fail).handle({"data": b'{"command": "shutdown"}'})
    assert "a command on this worker's channel could not be carried out: ConnectionError" in caplog.messages


def test_the_channels_thread_survives_any_error(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq.worker.commands.RETRY_S", 0.05)
    failing, heard = threading.Event(), threading.Event()

    def read(_message: Any) -> None:
        if not failing.is_set():
            failing.set()
            raise redis.ResponseError("LOADING or whatever")
        heard.set()

    pubsub = queue._client.pubsub()
    pubsub.subscribe(**{keys.worker_channel("w1"): read})
    thread = pubsub.run_in_thread(sleep_time=0.05, daemon=True, exception_handler=survive)
    try:
        until(lambda: queue._redis.publish(keys.worker_channel("w1"), "x") and failing.is_set())
        until(lambda: queue._redis.publish(keys.worker_channel("w1"), "x") and heard.is_set())
    finally:
        thread.stop()
        thread.join(10)


def test_the_channel_is_rqs(queue: EmbedQueue) -> None:
    assert EmbedWorker(["embed"], name="w1", connection=queue._client).pubsub_channel_name == keys.worker_channel("w1")


# --- jobs in hand


def test_a_stopped_job_ends_as_rq_ends_it(queue: EmbedQueue, hand: InHand) -> None:
    job = theirs(queue, retry=Retry(max=3), on_stopped=Callback(f"{__name__}.note"))
    [claim] = hand.claim()
    hand.interruptions.stop(job.id)
    assert job.get_status() == "stopped"
    assert hand.leases.is_lost(claim)
    assert Queue("embed", connection=queue._client).failed_job_registry.get_job_ids() == [job.id]
    result = job.latest_result()
    assert result is not None
    assert (result.type, result.worker_name, result.execution_id) == (result.Type.FAILED, "w1", claim.execution_id)
    assert "stopped on request" in str(result.exc_string)
    assert leftovers(queue) == set()
    assert queue.depth() == 0
    with pytest.raises(JobFailedError) as caught:
        queue.result(job.id)
    assert (caught.value.code, caught.value.retryable) == ("stopped", False)
    until(lambda: CALLED)
    [(seen, connection)] = CALLED
    assert (seen.id, connection.get("nothing")) == (job.id, None)


def test_what_is_published_for_a_stopped_job_changes_nothing(queue: EmbedQueue, hand: InHand) -> None:
    job = queue.enqueue("a")
    [claim] = hand.claim()
    hand.interruptions.stop(job.id)
    assert hand.store.publish([Outcome.finished(claim, b"x", 0.1)]) == []
    assert len(hand.store.release([claim])) == 0
    assert job.status() is JobStatus.STOPPED
    assert queue._redis.xlen(keys.results(job.id)) == 1


def test_stopping_twice_or_too_late_changes_nothing(queue: EmbedQueue, hand: InHand) -> None:
    stopped, finished = queue.enqueue("a"), queue.enqueue("b")
    first, second = hand.claim()
    hand.store.publish([Outcome.finished(second, b"x", 0.1)])
    for _ in range(2):
        hand.interruptions.stop(stopped.id)
        hand.interruptions.stop(finished.id)
    assert (stopped.status(), finished.status()) == (JobStatus.STOPPED, JobStatus.FINISHED)
    assert queue._redis.xlen(keys.results(stopped.id)) == 1
    assert hand.leases.is_lost(first)


def test_only_the_execution_that_is_meant_is_stopped(queue: EmbedQueue, hand: InHand) -> None:
    job = queue.enqueue("a")
    [claim] = hand.claim()
    hand.interruptions.stop(job.id, "another")
    assert job.status() is JobStatus.STARTED
    hand.interruptions.stop(job.id, claim.execution_id)
    assert job.status() is JobStatus.STOPPED


def test_a_stopped_job_can_be_requeued(queue: EmbedQueue, hand: InHand) -> None:
    job = queue.enqueue("a", retries=2)
    hand.claim()
    hand.interruptions.stop(job.id)
    job.requeue()
    assert job.status() is JobStatus.QUEUED
    assert queue._redis.zcard(keys.failed("embed")) == 0


def test_a_stopped_job_frees_the_slot_of_its_rate_limit(queue: EmbedQueue, hand: InHand) -> None:
    limit = RateLimit("slots", concurrency=1)
    first, second = (theirs(queue, rate_limit=limit) for _ in range(2))
    hand.claim()
    hand.interruptions.stop(first.id)
    assert (first.get_status(), second.get_status()) == ("stopped", "queued")


@pytest.mark.parametrize("callback", [None, Callback(f"{__name__}.note")])
def test_a_stopped_job_whose_failures_nobody_keeps_goes(
    queue: EmbedQueue, hand: InHand, callback: Callback | None
) -> None:
    job = theirs(queue, failure_ttl=0, on_stopped=callback)
    hand.claim()
    hand.interruptions.stop(job.id)
    assert 0 < queue._redis.ttl(keys.job(job.id)) <= 600 if callback else not queue._redis.exists(keys.job(job.id))
    if callback:
        until(lambda: CALLED)


def test_a_canceled_job_is_told_to_whoever_holds_it(queue: EmbedQueue, hand: InHand) -> None:
    told: list[Any] = []
    handler = CommandHandler(lambda: None, lambda *_: None, told.append)
    pubsub = queue._client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(**{keys.cancel_channel("w1"): handler.handle_cancel})
    pubsub.get_message(timeout=5)
    job, other = queue.enqueue("a"), queue.enqueue("b")
    hand.claim()
    for waiting in (job, other):
        assert waiting.cancel()
    until(lambda: pubsub.get_message(timeout=0.1) or len(told) == 2)
    assert told == [job.id, other.id]
    pubsub.close()


def test_a_canceled_job_is_lost_at_once_and_an_uncanceled_one_is_not(queue: EmbedQueue, hand: InHand) -> None:
    canceled, kept = queue.enqueue("a"), queue.enqueue("b")
    first, second = hand.claim()
    canceled.cancel()
    for job in (canceled, kept):
        hand.interruptions.cancel(job.id)  # for the second, somebody's lie
    hand.interruptions.cancel("unheard-of")
    assert (hand.leases.is_lost(first), hand.leases.is_lost(second)) == (True, False)
    hand.store.publish([Outcome.finished(second, b"x", 0.1)])
    assert kept.status() is JobStatus.FINISHED


def test_a_user_that_may_not_publish_can_still_cancel(each_url: str, queue: EmbedQueue, hand: InHand) -> None:
    queue._redis.execute_command("ACL", "SETUSER", "mute", "on", ">pw", "~*", "+@all", "-publish", "resetchannels")
    try:
        job = queue.enqueue("a")
        [claim] = hand.claim()
        with connect(each_url, username="mute", password="pw") as client:
            assert EmbedQueue(connection=client).cancel(job.id)
        assert job.status() is JobStatus.CANCELED
        assert hand.store.renew([claim], 60).lost == [claim]
    finally:
        queue._redis.execute_command("ACL", "DELUSER", "mute")


# --- a running worker


def _only_worker(queue: EmbedQueue) -> str:
    [key] = queue._redis.smembers(keys.WORKERS)
    return str(key.decode().removeprefix(keys.worker("")))


@pytest.mark.parametrize("by_execution", [False, True])
def test_rqs_stop_commands_end_a_job_on_the_device(
    each_url: str,
    queue: EmbedQueue,
    start: Start,  # noqa: F811
    hanging_device: list[str],  # noqa: F811
    by_execution: bool,
) -> None:
    job = queue.enqueue("a", retries=3)
    worker = start(at=each_url, program=hanging_device)
    until(lambda: job.status() is JobStatus.STARTED)
    if by_execution:
        [execution] = queue._redis.zrange(keys.executions(job.id), 0, -1)
        send_stop_execution_command(queue._client, job.id, execution.decode())
    else:
        send_stop_job_command(queue._client, job.id, serializer=EmbedSerializer)
    with pytest.raises(JobFailedError, match="stopped on request"):
        job.result(timeout=20)
    assert worker.process.poll() is None


def test_cancelling_a_job_on_the_device_wakes_who_waits(
    each_url: str,
    queue: EmbedQueue,
    start: Start,  # noqa: F811
    hanging_device: list[str],  # noqa: F811
) -> None:
    job = queue.enqueue("a")
    start(at=each_url, program=hanging_device)
    until(lambda: job.status() is JobStatus.STARTED)
    job.cancel()
    with pytest.raises(JobCanceledError):
        job.result(timeout=20)


def test_a_canceled_job_leaves_a_formed_batch_before_it_is_encoded(
    each_url: str,
    queue: EmbedQueue,
    start: Start,  # noqa: F811
    short_path: Path,
) -> None:
    """Long before its lease is renewed, which would tell as well."""
    script = short_path / "slow.py"
    script.write_text(
        "import time\n"
        "from embedq.model import NoopEncoder\n"
        "from embedq.worker.cli import main\n"
        "encode = NoopEncoder.encode_tokens\n"
        "def slow(self, batch):\n"
        "    print('encoding', [text.num_tokens for text in batch], flush=True)\n"
        "    time.sleep(1)\n"
        "    return encode(self, batch)\n"
        "NoopEncoder.encode_tokens = slow\n"
        "main()\n"
    )
    jobs = [queue.enqueue(" ".join(["word"] * number)) for number in (10, 20, 30)]
    worker = start("--max-batch-tokens", "1", at=each_url, program=[sys.executable, str(script)])
    until(lambda: "encoding [" in worker.log.read_text())
    [being_encoded] = [
        job for job, tokens in zip(jobs, (12, 22, 32), strict=True) if f"encoding [{tokens}]" in worker.log.read_text()
    ]
    canceled, kept = (job for job in jobs if job is not being_encoded)
    assert canceled.cancel()
    assert len(being_encoded.result()) == len(kept.result()) == 1
    worker.send(signal.SIGTERM)
    _, output = worker.ended()
    assert output.count("encoding [") == 2


def test_a_worker_works_on_after_nonsense_on_its_channel(
    each_url: str,
    queue: EmbedQueue,
    start: Start,  # noqa: F811
) -> None:
    worker = start(at=each_url)
    until(lambda: idle_workers(queue))
    name = _only_worker(queue)
    queue._redis.publish(keys.worker_channel(name), b"\x80nonsense")
    send_kill_horse_command(queue._client, name)
    send_command(queue._client, name, "stop-job", job_id="unheard-of")
    assert len(queue.embed("a", timeout=20)) == 1
    send_command(queue._client, name, "shutdown")
    status, output = worker.ended()
    assert status == 0, output
    assert "could not be carried out: UnicodeDecodeError" in output
    assert "told to kill its horse: this worker has none" in output
    assert "told to stop a job that is not in hand" in output
