"""What RQ's own code and command line make of our jobs, and the facts of RQ's that we rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import rq.job
import rq.registry
import rq.results
import rq.suspension
import rq.worker_registration
from rq import Queue, SimpleWorker
from rq.command import send_shutdown_command
from rq.executions import ExecutionRegistry
from rq.group import Group
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.worker import DequeueStrategy

from embedq.producer import Embeddings, EmbedQueue, EmbedSerializer, JobFailedError, JobStatus, keys
from embedq.worker import tasks
from embedq.worker.settings import DequeueStrategyName
from tests.conftest import Drain, until
from tests.queue.test_worker import Start, idle_workers, start, workers  # noqa: F401

RQ = str(Path(sys.executable).parent / "rq")
SERIALIZER = "embedq.producer.serializer.EmbedSerializer"


def rq_command(url: str, *arguments: str, **environment: str) -> str:
    shown = subprocess.run(
        [RQ, *arguments, "--url", url],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "EMBEDQ_MODEL": "noop:8", **environment},
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout + shown.stderr


def fetch(queue: EmbedQueue, job_id: str) -> Job:
    return Job.fetch(job_id, connection=queue._client, serializer=EmbedSerializer)


# --- key names and states are RQ's


def test_every_key_name_is_rqs(queue: EmbedQueue) -> None:
    job = Job("j", connection=queue._client)
    assert keys.job("j") == job.key
    assert keys.dependents("j") == job.dependents_key
    assert keys.dependencies("j") == job.dependencies_key
    assert keys.results("j") == rq.results.Result.get_key("j")
    assert keys.executions("j") == ExecutionRegistry("j", queue._client).key
    assert keys.execution("j", "e") == rq.executions.Execution("e", "j", queue._client).key
    rq_queue = Queue("q", connection=queue._client)
    assert keys.queue("q") == rq_queue.key
    assert keys.queue_name(rq_queue.key) == "q"
    assert Queue.redis_queues_keys == keys.QUEUES
    assert keys.started("q") == rq_queue.started_job_registry.key
    assert keys.finished("q") == rq_queue.finished_job_registry.key
    assert keys.failed("q") == rq_queue.failed_job_registry.key
    assert keys.canceled("q") == rq_queue.canceled_job_registry.key
    assert keys.scheduled("q") == rq_queue.scheduled_job_registry.key
    assert keys.deferred("q") == rq_queue.deferred_job_registry.key
    worker = SimpleWorker(["q"], name="w", connection=queue._client)
    assert keys.worker("w") == worker.key
    assert keys.worker_executions("w") == worker.executions_key
    assert keys.worker_channel("w") == worker.pubsub_channel_name
    assert keys.group("g") == Group.get_key("g")
    assert keys.GROUPS == Group.REDIS_GROUP_KEY
    assert keys.WORKERS == rq.worker_registration.REDIS_WORKER_KEYS
    assert keys.SUSPENDED == rq.suspension.WORKERS_SUSPENDED
    assert IntermediateQueue.get_intermediate_queue_key(keys.queue("q")) == "rq:queue:q:intermediate"


def test_every_state_of_rqs_is_known() -> None:
    assert {status.value for status in rq.job.JobStatus} == {status.value for status in JobStatus}


def test_the_types_of_result_entries_are_rqs() -> None:
    kinds = rq.results.Result.Type
    assert (kinds.SUCCESSFUL.value, kinds.FAILED.value, kinds.STOPPED.value, kinds.RETRIED.value) == (1, 2, 3, 4)


# --- RQ's code reads our jobs


def test_rq_fetches_our_job_and_its_return_value(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue(["a", "b"], retries=2, result_ttl=60)
    seen = fetch(queue, job.id)
    assert seen.get_status() == "queued"
    assert (seen.func_name, seen.origin, seen.retries_left, seen.result_ttl) == (
        *("embedq.worker.tasks.embed", "embed"),
        *(2, 60),
    )
    drain()
    seen = fetch(queue, job.id)
    assert seen.get_status() == "finished"
    value = seen.return_value()
    assert isinstance(value, Embeddings)
    assert value.vectors.shape == (2, 8)
    assert seen.started_at is not None
    assert seen.ended_at is not None
    result = seen.latest_result()
    assert result is not None
    assert result.execution_id is not None
    assert result.worker_name == value.worker


def test_rqs_registries_count_our_jobs(queue: EmbedQueue, drain: Drain) -> None:
    done, failed = queue.enqueue("a"), queue.enqueue("b", dimensions=99)
    drain()
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    assert theirs.finished_job_registry.get_job_ids() == [done.id]
    assert theirs.failed_job_registry.get_job_ids() == [failed.id]
    assert theirs.started_job_registry.count == 0
    result = fetch(queue, failed.id).latest_result()
    assert result is not None
    assert "dimensions must be 1 to 8" in str(result.exc_string)


def test_rq_cancels_our_waiting_job(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("a")
    fetch(queue, job.id).cancel()
    assert job.status() is JobStatus.CANCELED
    assert drain().successful_job_count == 0


def test_rqs_clean_up_of_a_dead_worker_agrees_with_ours(queue: EmbedQueue) -> None:
    """`rq info` may come first after a lease has run out."""
    from embedq.worker.claims import ClaimStore

    again, last = queue.enqueue("a", retries=1), queue.enqueue("b", retries=0)
    for claim in ClaimStore(queue._client, "w1", 30).claim(["embed"], 10, 10**9).claims:
        queue._redis.zadd(keys.started("embed"), {f"{claim.job_id}:{claim.execution_id}": 1})
    Queue("embed", connection=queue._client).started_job_registry.cleanup()
    assert again.status() is JobStatus.QUEUED
    with pytest.raises(JobFailedError) as caught:
        last.result(timeout=0)
    assert caught.value.code == JobFailedError.ABANDONED


# --- RQ's command line


def test_rq_info_shows_queue_worker_and_counts(queue: EmbedQueue, start: Start, url: str) -> None:  # noqa: F811
    start("--name", "worker-one")
    until(lambda: workers(queue))
    queue.embed("a", timeout=20)
    queue.enqueue("b", dimensions=99)
    until(lambda: queue._redis.zcard(keys.failed("embed")))
    shown = rq_command(url, "info", "--raw")
    assert "queue embed 0, 0 executing, 1 finished, 1 failed" in shown
    assert "worker worker-one " in shown
    assert "jobs: 1 finished, 1 failed" in shown


def test_rq_requeue_brings_a_failed_job_back(queue: EmbedQueue, drain: Drain, url: str) -> None:
    job = queue.enqueue("a", dimensions=99)
    drain()
    rq_command(url, "requeue", "--queue", "embed", "-S", SERIALIZER, "--all")
    assert job.status() is JobStatus.QUEUED
    assert queue.depth() == 1
    drain(model="noop:128")
    assert job.result().vectors.shape == (1, 99)


def test_a_stock_rq_worker_runs_our_jobs(queue: EmbedQueue, url: str) -> None:
    job, bad = queue.enqueue(["a", "b"], dimensions=4), queue.enqueue("c", dimensions=99, retries=0)
    rq_command(url, "worker", "--burst", "-S", SERIALIZER, "embed")
    assert job.result(timeout=0).vectors.shape == (2, 4)
    with pytest.raises(JobFailedError, match="dimensions must be 1 to 8") as caught:
        bad.result(timeout=0)
    assert caught.value.code == "unsupported_option"


def test_a_stock_worker_and_ours_give_the_same_vectors(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDQ_MODEL", "noop:8")
    tasks._engine.cache_clear()
    theirs = queue.enqueue(["a", "b"])
    SimpleWorker(["embed"], connection=queue._client, serializer=EmbedSerializer).work(burst=True)
    ours = queue.enqueue(["a", "b"])
    drain()
    tasks._engine.cache_clear()
    assert theirs.result().vectors.tolist() == ours.result().vectors.tolist()


def test_rq_worker_with_our_class_drains_in_micro_batches(queue: EmbedQueue, url: str) -> None:
    jobs = queue.enqueue_many([f"text {n}" for n in range(40)])
    shown = rq_command(url, "worker", "--burst", "--worker-class", "embedq.worker.EmbedWorker", "embed")
    assert {job.status() for job in jobs} == {JobStatus.FINISHED}
    assert jobs[0].result().timings.batch_texts == 40
    assert "micro-batch: 40 texts of 40 jobs" in shown


def test_rq_suspend_and_resume_stop_and_start_our_worker(queue: EmbedQueue, start: Start, url: str) -> None:  # noqa: F811
    start()
    until(lambda: workers(queue))
    rq_command(url, "suspend")
    job = queue.enqueue("a")
    until(lambda: b"suspended" in queue._redis.hgetall(keys.worker(_only_worker(queue))).values())
    assert job.status() is JobStatus.QUEUED
    rq_command(url, "resume")
    assert len(job.result(timeout=20)) == 1


def test_rqs_shutdown_command_stops_our_worker(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    worker = start()
    until(lambda: idle_workers(queue))
    send_shutdown_command(queue._client, _only_worker(queue))
    status, output = worker.ended()
    assert status == 0, output


def _only_worker(queue: EmbedQueue) -> str:
    [key] = queue._redis.smembers(keys.WORKERS)
    return str(key.decode().removeprefix(keys.worker("")))


def test_the_dequeue_strategies_are_rqs() -> None:
    assert get_args(DequeueStrategyName) == tuple(strategy.value for strategy in DequeueStrategy)
