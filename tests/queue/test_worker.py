"""The worker as a process: what it does with jobs, bad jobs, signals, sudden death and a Redis that goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Callback, Queue, Retry
from rq.job import Job
from rq.rate_limit import RateLimit
from rq.worker import DequeueStrategy

from embedq.model import NoopEncoder
from embedq.producer import ConfigurationError, EmbedQueue, EmbedSerializer, JobFailedError, JobStatus, keys
from embedq.producer.connection import connect
from embedq.worker import EmbedWorker, WorkerSettings
from embedq.worker.claims import ClaimStore, Outcome, Recovered, Renewed
from embedq.worker.leases import LeaseKeeper
from embedq.worker.redis_server import RedisServer
from embedq.worker.stages import WorkerStages
from embedq.worker.waiting import QueueWaiter
from tests.conftest import Drain, until

EMBEDQ = (sys.executable, "-m", "embedq.worker.cli")


class RunningWorker:
    """`embedq worker` with its output in a file: a pipe that nobody reads would stop it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, timeout_s: float = 20) -> tuple[int, str]:
        """Exit status and all it said."""
        return self.process.wait(timeout_s), self.log.read_text()


Start = Callable[..., RunningWorker]


@pytest.fixture
def start(url: str, tmp_path: Path) -> Iterator[Start]:
    """`start("embed", "--lease-s", "1")` runs `embedq worker` with the stand-in; ended after the test."""
    running: list[RunningWorker] = []

    def run(*arguments: str, at: str = url, program: Sequence[str] = EMBEDQ) -> RunningWorker:
        command = [*program, "worker", "--url", at, "--model", "noop:8", *arguments]
        running.append(RunningWorker(command, tmp_path / f"worker-{len(running)}.log"))
        return running[-1]

    yield run
    for worker in running:
        if worker.process.poll() is None:
            worker.send(signal.SIGCONT)
            worker.process.kill()
            worker.process.wait(20)


@pytest.fixture
def hanging_device(short_path: Path) -> list[str]:
    """`embedq` with a device that takes 20 s for a micro-batch."""
    script = short_path / "hanging.py"
    script.write_text(
        "import time\n"
        "from embedq.model import NoopEncoder\n"
        "from embedq.worker.cli import main\n"
        "def hang(self, batch):\n"
        "    print('on the device', flush=True)\n"
        "    time.sleep(20)\n"
        "NoopEncoder.encode_tokens = hang\n"
        "main()\n"
    )
    return [sys.executable, str(script)]


def finished(queue: EmbedQueue) -> int:
    return int(queue._redis.zcard(keys.finished("embed")))


def workers(queue: EmbedQueue) -> int:
    return int(queue._redis.scard(keys.WORKERS))


def idle_workers(queue: EmbedQueue) -> int:
    """Those that have done all that belongs to starting."""
    states = [queue._redis.hget(key, "state") for key in queue._redis.smembers(keys.WORKERS)]
    return states.count(b"idle")


# --- jobs


def test_jobs_of_many_kinds_share_micro_batches(queue: EmbedQueue, drain: Drain) -> None:
    small = queue.enqueue_many(["a", "b"])
    large = queue.enqueue([str(n) for n in range(300)], precision="float16")
    worker = drain()
    assert worker.successful_job_count == 3
    timings = large.result().timings
    assert timings.batch_texts == 302
    assert small[0].result().timings.batch_texts == 302
    assert large.result().worker == worker.name


def test_a_payload_that_cannot_be_read_fails_alone(queue: EmbedQueue, drain: Drain) -> None:
    good = queue.enqueue_many(["a", "b"])
    bad = queue.enqueue("c")
    queue._redis.hset(keys.job(bad.id), "data", b"\x80\x04\x95nonsense")
    hollow = queue.enqueue("d")
    queue._redis.hdel(keys.job(hollow.id), "data")
    drain()
    assert [job.status() for job in good] == [JobStatus.FINISHED] * 2
    for job in (bad, hollow):
        with pytest.raises(JobFailedError) as caught:
            job.result(timeout=0)
        assert caught.value.code == "bad_payload"
        assert not caught.value.retryable


def test_urgent_queues_come_first(queue: EmbedQueue, drain: Drain) -> None:
    with EmbedQueue(connection=queue._client, queue="urgent") as urgent:
        slow, fast = queue.enqueue("slow"), urgent.enqueue("fast")
    drain("urgent", "embed", max_jobs=1)
    assert (fast.status(), slow.status()) == (JobStatus.FINISHED, JobStatus.QUEUED)


def test_max_jobs_is_kept(queue: EmbedQueue, drain: Drain) -> None:
    queue.enqueue_many([str(n) for n in range(10)])
    drain(max_jobs=4)
    assert queue.depth() == 6


def test_a_worker_ends_with_its_last_job_and_waits_for_no_other(queue: EmbedQueue, url: str) -> None:
    job = queue.enqueue("text")
    began_at = time.monotonic()
    with connect(url) as client:
        EmbedWorker(["embed"], connection=client, settings=WorkerSettings(model="noop:8")).work(max_jobs=1)
    assert job.status() is JobStatus.FINISHED
    assert time.monotonic() - began_at < 10  # not the 15 s after which an idle worker looks around


def test_a_finished_worker_leaves_nothing_but_results(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text")
    worker = drain()
    left = {key.decode() for key in queue._redis.keys("*")}
    expiring = {keys.worker(worker.name), keys.job(job.id), keys.results(job.id), f"{keys.PREFIX}:clean_groups"}
    expiring.add(keys.worker_claim(worker.name))
    assert left == {keys.QUEUES, keys.finished("embed")} | expiring
    assert all(queue._redis.ttl(key) > 0 for key in expiring)


@pytest.mark.parametrize("result_ttl", [500, 0])
def test_jobs_that_depend_on_ours_are_enqueued_when_it_ends(queue: EmbedQueue, drain: Drain, result_ttl: int) -> None:
    first = queue.enqueue("text", result_ttl=result_ttl)
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    second = theirs.enqueue("embedq.worker.tasks.embed", kwargs={"texts": ["after"]}, depends_on=first.id)
    assert second.get_status() == "deferred"
    drain()
    assert Job.fetch(second.id, connection=queue._client, serializer=EmbedSerializer).get_status() == "finished"
    assert queue.result(second.id).num_tokens == (3,)


class BrokenEncoder(NoopEncoder):
    """Raises what no encoder should: a bug, or a library that surprises."""

    def __init__(self, step: str) -> None:
        super().__init__(8)
        self._step = step

    def tokenize(self, texts: Any, **options: Any) -> Any:
        if self._step == "tokenize" and "bad" in texts:
            raise KeyError("no such word")
        return super().tokenize(texts, **options)

    def encode_tokens(self, batch: Any) -> Any:
        if self._step == "encode" and any(text.num_tokens == 2 + 5 for text in batch):
            raise KeyError("no such kernel")
        return super().encode_tokens(batch)

    def postprocess(self, vectors: Any, **options: Any) -> Any:
        if self._step == "postprocess" and options["dimensions"] == 3 and len(vectors):
            raise ZeroDivisionError("surprise")
        return super().postprocess(vectors, **options)


@pytest.mark.parametrize("step", ["tokenize", "encode", "postprocess"])
def test_an_encoder_that_raises_anything_fails_its_job_and_no_worker(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("embedq.worker.worker.load_encoder", lambda _settings: BrokenEncoder(step))
    good = queue.enqueue_many(["a", "b"])
    texts = {"tokenize": "bad", "encode": "one two three four five", "postprocess": "x"}
    bad = queue.enqueue(texts[step], dimensions=3, retries=1)
    worker = drain()
    assert [job.status() for job in good] == [JobStatus.FINISHED] * 2
    with pytest.raises(JobFailedError) as caught:
        bad.result(timeout=0)
    assert caught.value.code == ("encode_failed" if step == "encode" else "internal")
    assert (worker.successful_job_count, worker.failed_job_count) == (2, 2)  # the retry counts too


def test_a_hash_that_rq_cannot_read_ends_no_worker(queue: EmbedQueue, drain: Drain) -> None:
    """In the started registry, where maintenance looks, and with jobs that depend on it."""
    queue._redis.hset(keys.job("corrupt"), mapping={"status": "started", "data": "x", "created_at": "never"})
    queue._redis.zadd(keys.started("embed"), {"corrupt:0123": 1})
    job = queue.enqueue("text")
    queue._redis.hset(keys.job(job.id), "created_at", "never")
    queue._redis.sadd(keys.dependents(job.id), "another")
    drain()
    assert job.status() is JobStatus.FINISHED
    assert queue.status("corrupt") is JobStatus.FAILED


def planted_callback(*_: Any) -> None:
    raise AssertionError("a worker of ours called what a job names")


def test_callbacks_that_a_job_names_are_not_called(queue: EmbedQueue, drain: Drain) -> None:
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    callback = Callback("tests.queue.test_worker.planted_callback")
    options: dict[str, Any] = {"on_success": callback, "on_failure": callback, "on_stopped": callback}
    good, bad, abandoned = (
        theirs.enqueue("embedq.worker.tasks.embed", kwargs={"texts": ["a"], **extra}, **options)
        for extra in ({}, {"dimensions": 99}, {})
    )
    queue._redis.lrem(keys.queue("embed"), 0, abandoned.id)
    queue._redis.hset(keys.job(abandoned.id), "status", "started")
    queue._redis.zadd(keys.started("embed"), {f"{abandoned.id}:0123": 1})
    drain()
    assert (good.get_status(), bad.get_status(), abandoned.get_status()) == ("finished", "failed", "failed")


def test_a_retry_that_is_scheduled_frees_the_slot_of_its_rate_limit(queue: EmbedQueue, drain: Drain) -> None:
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    options: dict[str, Any] = {"rate_limit": RateLimit("slots", concurrency=1), "retry": Retry(max=1, interval=600)}
    first, second = (theirs.enqueue("embedq.worker.tasks.embed", kwargs={"texts": [text]}, **options) for text in "ab")
    queue._redis.lrem(keys.queue("embed"), 0, first.id)
    queue._redis.hset(keys.job(first.id), "status", "started")
    queue._redis.zadd(keys.started("embed"), {f"{first.id}:0123": 1})
    until(lambda: drain() and second.get_status() == "finished")
    assert first.get_status() == "scheduled"


def test_jobs_under_a_rate_limit_free_their_slots(queue: EmbedQueue, drain: Drain) -> None:
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    limit = RateLimit("slots", concurrency=1)
    jobs = [theirs.enqueue("embedq.worker.tasks.embed", kwargs={"texts": [text]}, rate_limit=limit) for text in "abc"]
    drain()
    assert [job.get_status() for job in jobs] == ["finished"] * 3


# --- idle, suspended, stopped


def test_an_idle_worker_wakes_at_once_when_a_job_comes(queue: EmbedQueue, start: Start) -> None:
    start("embed", "other")
    until(lambda: workers(queue))
    time.sleep(0.5)
    with EmbedQueue(connection=queue._client, queue="other") as other:
        for client in (queue, other, queue):
            began_at = time.monotonic()
            client.embed("text", timeout=20)
            assert time.monotonic() - began_at < 5  # not the 15 s after which it would look by itself
    [key] = queue._redis.smembers(keys.WORKERS)
    until(lambda: queue._redis.hget(key, "state") == b"idle")


def test_sigterm_ends_an_idle_worker_at_once(queue: EmbedQueue, start: Start) -> None:
    worker = start()
    until(lambda: workers(queue))
    time.sleep(0.3)
    worker.send(signal.SIGTERM)
    status, output = worker.ended(10)
    assert status == 0, output
    assert workers(queue) == 0
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_publishes_what_is_done_and_gives_the_rest_back_in_order(
    queue: EmbedQueue, start: Start, number: signal.Signals
) -> None:
    jobs = queue.enqueue_many([f"text {n}" for n in range(20_000)])
    worker = start("--max-batch-tokens", "8", "--max-claim-jobs", "20000")
    until(lambda: finished(queue) > 5)
    worker.send(number)
    status, output = worker.ended()
    assert status == 0, output
    done = finished(queue)
    waiting = [entry.decode() for entry in queue._redis.lrange(keys.queue("embed"), 0, -1)]
    assert 5 < done < len(jobs)
    assert done + len(waiting) == len(jobs)
    order = {job.id: place for place, job in enumerate(jobs)}
    assert [order[job_id] for job_id in waiting] == sorted(order[job_id] for job_id in waiting)
    assert queue._redis.keys("*execution*") == []
    assert queue._redis.zcard(keys.started("embed")) == 0


def test_a_killed_workers_jobs_are_done_by_another_after_the_lease(queue: EmbedQueue, start: Start) -> None:
    jobs = queue.enqueue_many([f"text {n}" for n in range(2_000)])
    first = start("--max-batch-tokens", "8", "--lease-s", "1", "--max-claim-jobs", "1500")
    until(lambda: finished(queue) > 5)
    first.send(signal.SIGKILL)
    first.ended()
    start("--lease-s", "1")
    until(lambda: finished(queue) == len(jobs), timeout_s=30)
    assert {job.status() for job in jobs} == {JobStatus.FINISHED}
    assert all(queue._redis.xlen(keys.results(job.id)) == 1 for job in jobs)
    assert queue._redis.zcard(keys.started("embed")) == 0


def test_a_worker_that_sleeps_past_its_lease_changes_nothing_afterwards(queue: EmbedQueue, start: Start) -> None:
    jobs = queue.enqueue_many([f"text {n}" for n in range(3_000)])
    sleeper = start("--max-batch-tokens", "8", "--lease-s", "1", "--max-claim-jobs", "3000")
    until(lambda: finished(queue) > 5)
    sleeper.send(signal.SIGSTOP)
    start("--lease-s", "1")
    until(lambda: finished(queue) == len(jobs), timeout_s=30)
    sleeper.send(signal.SIGCONT)
    time.sleep(0.5)
    sleeper.send(signal.SIGTERM)
    sleeper.ended()
    assert all(queue._redis.xlen(keys.results(job.id)) == 1 for job in jobs)
    assert {job.status() for job in jobs} == {JobStatus.FINISHED}


def test_suspended_workers_wait_and_resume(queue: EmbedQueue, start: Start) -> None:
    queue._redis.set(keys.SUSPENDED, 1)
    start()
    until(lambda: workers(queue))
    job = queue.enqueue("text")
    time.sleep(1.0)
    assert job.status() is JobStatus.QUEUED
    queue._redis.delete(keys.SUSPENDED)
    assert len(job.result(timeout=20)) == 1


def test_a_worker_outlives_a_restart_of_redis(short_path: Path, start: Start) -> None:
    server = RedisServer(short_path, durable=True)
    with server, EmbedQueue(server.url) as queue:
        worker = start(at=server.url)
        until(lambda: workers(queue))
        assert len(queue.embed("before", timeout=20)) == 1
        server.stop()
        time.sleep(0.3)
        server.start()
        assert len(queue.embed("after", timeout=20)) == 1
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 0, output
        assert "trying again" in output


def test_an_outage_longer_than_the_lease_in_the_middle_of_work_strands_no_job(short_path: Path, start: Start) -> None:
    server = RedisServer(short_path, durable=True)
    with server, EmbedQueue(server.url) as queue:
        jobs = queue.enqueue_many([f"text {n}" for n in range(3_000)], retries=9)
        start("--max-batch-tokens", "8", "--lease-s", "1", "--max-claim-jobs", "3000", at=server.url)
        until(lambda: finished(queue) > 5)
        server.stop()
        time.sleep(2.5)
        server.start()
        until(lambda: finished(queue) == len(jobs), timeout_s=40)
        assert all(queue._redis.xlen(keys.results(job.id)) == 1 for job in jobs)
        assert queue._redis.zcard(keys.started("embed")) == 0


def fill_up(server: Any, begin: bool) -> None:
    server.config_set("maxmemory", "1" if begin else "0")


def make_replica(server: Any, begin: bool) -> None:
    """As in a failover: the old master follows another."""
    server.replicaof(*(("127.0.0.1", "1") if begin else ("no", "one")))


def demand_replicas(server: Any, begin: bool) -> None:
    """As a master that is cut off from its replicas, and told to lose nothing."""
    server.config_set("min-replicas-to-write", "1" if begin else "0")


@pytest.mark.parametrize("fault", [fill_up, make_replica, demand_replicas])
def test_a_redis_that_refuses_for_a_while_costs_no_job(
    queue: EmbedQueue, start: Start, fault: Callable[[Any, bool], None]
) -> None:
    idle = start("other")
    until(lambda: idle_workers(queue) == 1)
    jobs = queue.enqueue_many([f"text {n}" for n in range(2_000)])
    worker = start("--max-batch-tokens", "8", "--max-claim-jobs", "500")
    until(lambda: finished(queue) > 5)
    fault(queue._redis, True)
    try:
        time.sleep(1.0)
        assert worker.process.poll() is idle.process.poll() is None
    finally:
        fault(queue._redis, False)
    until(lambda: finished(queue) == len(jobs), timeout_s=30)


def test_sigterm_is_honoured_while_redis_is_down(short_path: Path, start: Start) -> None:
    server = RedisServer(short_path)
    with server, EmbedQueue(server.url) as queue:
        worker = start(at=server.url)
        until(lambda: workers(queue))
        time.sleep(0.3)
        server.stop()
        time.sleep(0.3)
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 0, output
        assert "left without a word to Redis" in output
        assert "Traceback" not in output


def test_the_grace_is_kept_even_if_redis_hangs(short_path: Path, start: Start) -> None:
    with RedisServer(short_path) as server, EmbedQueue(server.url) as queue:
        queue.enqueue_many([f"text {n}" for n in range(5_000)])
        worker = start("--max-batch-tokens", "8", "--grace-s", "1", at=server.url)
        until(lambda: finished(queue) > 5)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            time.sleep(0.2)
            worker.send(signal.SIGTERM)
            status, output = worker.ended(15)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert status == 3, output
        assert "not done within the grace of 1 s" in output


def test_a_worker_that_redis_has_forgotten_registers_again(queue: EmbedQueue, start: Start) -> None:
    start("--lease-s", "1", "--name", "phoenix")
    until(lambda: workers(queue))
    queue._redis.flushall()
    until(lambda: workers(queue))
    [seen] = EmbedWorker.all(connection=queue._client)
    assert (seen.name, seen.queue_names()) == ("phoenix", ["embed"])
    assert queue._redis.ttl(seen.key) > 0
    assert len(queue.embed("text", timeout=20)) == 1


def test_the_lease_thread_survives_any_error() -> None:
    class Store:
        lease_s = 0.2
        rounds = 0

        def renew(self, *_: Any) -> Renewed:
            self.rounds += 1
            if self.rounds == 1:
                raise ValueError("a bug")
            if self.rounds == 2:
                raise redis.ConnectionError("away")
            return Renewed([], is_known=True)

        def recover(self, _queue: str) -> Recovered:
            return Recovered(0, 0, 0, [])

    store: Any = Store()
    leases = LeaseKeeper(store, ["embed"], 60, on_abandoned=lambda *_: None, on_forgotten=lambda: None)
    leases.start()
    until(lambda: store.rounds > 3)
    leases.stop()


def test_log_lines_are_json_if_asked(queue: EmbedQueue, start: Start) -> None:
    queue.enqueue("a secret text")
    _, output = start("--burst", "--log-format", "json").ended()
    lines = [json.loads(line) for line in output.splitlines()]
    assert any(line["message"].startswith("micro-batch: 1 texts of 1 jobs") for line in lines)
    assert "secret" not in output


# --- what the parts promise


def test_a_worker_that_is_only_looked_at_loads_nothing(queue: EmbedQueue, start: Start) -> None:
    start()
    until(lambda: workers(queue))
    [seen] = EmbedWorker.all(connection=queue._client)
    assert isinstance(seen, EmbedWorker)
    assert seen.queue_names() == ["embed"]
    assert not hasattr(seen, "engine")


def test_the_waiter_wakes_for_jobs_for_wake_and_for_time(queue: EmbedQueue) -> None:
    waiter = QueueWaiter(queue._client, [keys.queue("embed"), keys.queue("other")])
    try:
        began_at = time.monotonic()
        waiter.wait(0.2)
        assert 0.2 <= time.monotonic() - began_at < 2
        waiter.wake()
        waiter.wait(20)
        queue._redis.rpush(keys.queue("other"), "id")
        waiter.wait(20)
        assert time.monotonic() - began_at < 10
        assert queue._redis.lrange(keys.queue("other"), 0, -1) == [b"id"]
    finally:
        waiter.close()


def test_settings_come_from_the_environment() -> None:
    environment = {
        "EMBEDQ_MODEL": "noop:4",
        "EMBEDQ_LEASE_S": "5",
        "EMBEDQ_MAX_BATCH_TOKENS": "99",
        "EMBEDQ_DEVICE": "",
        "EMBEDQ_WARM_UP": "no",
        "EMBEDQ_ALLOW_TF32": "1",
    }
    settings = WorkerSettings.from_environment(environment)
    assert settings == WorkerSettings(model="noop:4", lease_s=5.0, max_batch_tokens=99, warm_up=False, allow_tf32=True)
    assert WorkerSettings.from_environment({}).warm_up is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EMBEDQ_LEASE_S": "soon"}, "EMBEDQ_LEASE_S='soon' is not a number"),
        ({"EMBEDQ_WARM_UP": "maybe"}, "EMBEDQ_WARM_UP='maybe' is not true or false"),
        ({"EMBEDQ_LEASE_S": "0"}, "lease_s must be 1 to 86400 seconds, not 0"),
        ({"EMBEDQ_GRACE_S": "-1"}, "grace_s must be 0 to 86400"),
        ({"EMBEDQ_MAX_BATCH_TOKENS": "0"}, "max_batch_tokens must be 1 or more"),
        ({"EMBEDQ_MAX_CLAIM_JOBS": "0"}, "max_claim_jobs must be 1 or more"),
        ({"EMBEDQ_LOG_FORMAT": "xml"}, "log_format must be text or json"),
    ],
)
def test_a_setting_that_cannot_be_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WorkerSettings.from_environment(environment)


def test_a_grace_that_is_too_short_gives_the_jobs_back_and_says_so(
    queue: EmbedQueue, start: Start, hanging_device: list[str]
) -> None:
    job = queue.enqueue("text")
    worker = start("--grace-s", "0.5", program=hanging_device)
    until(lambda: "on the device" in worker.log.read_text())
    worker.send(signal.SIGTERM)
    status, output = worker.ended()
    assert status == 3, output
    assert "not done within the grace of 0.5 s" in output
    assert job.status() is JobStatus.QUEUED
    assert workers(queue) == 0


def test_a_second_signal_leaves_at_once_and_gives_the_jobs_back(
    queue: EmbedQueue, start: Start, hanging_device: list[str]
) -> None:
    job = queue.enqueue("text")
    worker = start(program=hanging_device)
    until(lambda: "on the device" in worker.log.read_text())
    worker.send(signal.SIGTERM)
    time.sleep(1.3)
    worker.send(signal.SIGTERM)
    status, output = worker.ended()
    assert status == 128 + signal.SIGTERM, output
    assert job.status() is JobStatus.QUEUED


def test_a_wrong_password_ends_the_worker_with_one_line(queue: EmbedQueue, url: str, start: Start) -> None:
    queue._redis.config_set("requirepass", "s3cret")
    try:
        worker = start()
        status, output = worker.ended()
    finally:
        with connect(url, password="s3cret") as admin:
            admin.config_set("requirepass", "")
    assert status == 5
    assert output.startswith("error: Redis at ")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("trouble", [{"EMBEDQ_MODEL": "noop:0"}, {}])
def test_a_worker_that_cannot_start_leaves_no_scheduler(
    queue: EmbedQueue, start: Start, url: str, trouble: dict[str, str]
) -> None:
    start("--name", "twin")
    until(lambda: workers(queue))
    rq = str(Path(sys.executable).parent / "rq")
    command = [rq, "worker", "--url", url, "--worker-class", "embedq.worker.EmbedWorker", "--with-scheduler"]
    shown = subprocess.run(
        [*command, "--name", "twin", "embed"],
        env={**os.environ, "EMBEDQ_MODEL": "noop:8", **trouble},
        capture_output=True,
        timeout=60,
    )
    assert shown.returncode == 1  # it does not wait for its child for ever


def test_a_name_that_a_live_worker_has_is_refused_with_one_line(queue: EmbedQueue, start: Start) -> None:
    start("--name", "twin")
    until(lambda: workers(queue))
    second = start("--name", "twin")
    status, output = second.ended()
    assert status == 2
    assert output.startswith("error: There exists an active worker named 'twin' already; choose another --name")


# --- the pipeline under a worker


def test_a_micro_batch_costs_two_calls_of_redis(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    class SlowEncoder(NoopEncoder):
        def encode_tokens(self, batch: Any) -> Any:
            batches.append(len(batch))
            time.sleep(0.005)
            return super().encode_tokens(batch)

    monkeypatch.setattr("embedq.worker.worker.load_encoder", lambda _settings: SlowEncoder(8))
    queue.enqueue_many(f"text {n} of many that are much alike" for n in range(4000))
    queue._redis.config_resetstat()
    worker = drain(max_batch_tokens=500)
    calls = queue._redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert len(batches) > 50
    # A few more: claims are too small until the worker has learnt how many bytes fill a micro-batch.
    assert calls <= 2 * len(batches) + 25
    assert worker.successful_job_count == 4000


def test_a_device_is_hardly_ever_starved_while_there_is_work(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowEncoder(NoopEncoder):
        def encode_tokens(self, batch: Any) -> Any:
            time.sleep(0.02)
            return super().encode_tokens(batch)

    monkeypatch.setattr("embedq.worker.worker.load_encoder", lambda _settings: SlowEncoder(8))
    queue.enqueue_many(f"text {n}" for n in range(3000))
    worker = drain(max_batch_tokens=100)
    seconds = worker.pipeline.device_time.seconds
    assert seconds["encoding"] > 1
    # 0.5 % on a quiet machine; a test must pass on a busy one.
    assert worker.pipeline.device_time.starved_share < 0.3


@pytest.mark.parametrize("stage", ["tokenize", "encode", "publish"])
def test_a_stage_that_breaks_ends_the_worker_and_gives_its_jobs_back(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("the stage is broken")

    jobs = queue.enqueue_many(f"text {n}" for n in range(50))
    with monkeypatch.context() as patch:
        patch.setattr(WorkerStages, stage, broken)
        with pytest.raises(MemoryError, match="the stage is broken"):
            drain()
    waiting = [job_id.decode() for job_id in queue._redis.lrange(keys.queue("embed"), 0, -1)]
    assert waiting == [job.id for job in jobs]
    assert workers(queue) == 0
    assert queue._redis.keys("*execution*") == []
    drain()
    assert finished(queue) == 50


def test_short_jobs_are_not_held_up_by_a_long_one(queue: EmbedQueue, drain: Drain) -> None:
    order: list[str] = []
    long = queue.enqueue(["some words of a text"] * 1024)
    short = queue.enqueue_many(f"text {n} is short" for n in range(20))
    publish, encode = ClaimStore.publish, NoopEncoder.encode_tokens

    def recorded(self: ClaimStore, outcomes: Sequence[Outcome]) -> list[Outcome]:
        order.extend(outcome.claim.job_id for outcome in outcomes)
        return publish(self, outcomes)

    def slow(self: NoopEncoder, batch: Any) -> Any:
        # As a device: the long job is not through before the short ones are even claimed.
        time.sleep(0.02)
        return encode(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClaimStore, "publish", recorded)
        patch.setattr(NoopEncoder, "encode_tokens", slow)
        drain(max_batch_tokens=200)
    assert order[-1] == long.id
    assert set(order[:-1]) == {job.id for job in short}


@pytest.mark.parametrize("strategy", ["default", "round_robin", "random"])
def test_every_strategy_drains_every_queue(queue: EmbedQueue, url: str, strategy: str) -> None:
    with EmbedQueue(url, queue="other") as other:
        jobs = queue.enqueue_many("abc" * n for n in range(1, 30)) + other.enqueue_many("xyz" * n for n in range(1, 30))
        with connect(url) as client:
            settings = WorkerSettings(model="noop:8", max_claim_jobs=2)
            worker = EmbedWorker(["embed", "other"], connection=client, settings=settings)
            worker.work(burst=True, dequeue_strategy=DequeueStrategy(strategy))
        assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.FINISHED}


def test_lingering_and_a_latency_reach_the_pipeline(queue: EmbedQueue, drain: Drain) -> None:
    queue.enqueue("text")
    bounds = drain(linger_ms=1.5, max_latency_ms=250.0, prefetch_batches=3, max_batch_tokens=10).pipeline._bounds
    assert (bounds.linger_s, bounds.max_latency_s, bounds.prefetch_tokens) == (0.0015, 0.25, 30)
