"""Jobs that wait for a time, and jobs that wait for other jobs; RQ's own scheduler and dependents see them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from rq import Queue
from rq.job import Job
from rq.registry import DeferredJobRegistry, ScheduledJobRegistry
from rq.scheduler import RQScheduler

from embedq.producer import (
    EmbedQueue,
    EmbedSerializer,
    InvalidJobIdError,
    InvalidOptionError,
    JobNotFoundError,
    JobStatus,
    keys,
)
from tests.conftest import Drain, until
from tests.queue.test_worker import Start, start, workers  # noqa: F401

TASK = "embedq.worker.tasks.embed"
LATER = datetime(2090, 1, 31, 12, 0, 0, tzinfo=UTC)


def fetch(queue: EmbedQueue, job_id: str) -> Job:
    return Job.fetch(job_id, connection=queue._client, serializer=EmbedSerializer)


def rq_queue(queue: EmbedQueue) -> Queue:
    return Queue("embed", connection=queue._client, serializer=EmbedSerializer)


# --- delayed jobs


def test_a_delayed_job_is_scheduled_as_rq_schedules(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        job = queue.enqueue_at(LATER, "a", job_id="ours", at_front=True)
        theirs = rq_queue(queue).enqueue_at(
            LATER, "embedq.worker.tasks.embed", kwargs={"texts": ["a"]}, job_id="theirs"
        )
        assert (job.status(), queue.depth()) == (JobStatus.SCHEDULED, 0)
        registry = ScheduledJobRegistry("embed", connection=queue._client)
        assert registry.get_scheduled_time("ours") == registry.get_scheduled_time(theirs.id) == LATER
        assert fetch(queue, "ours").get_status() == "scheduled"
        assert fetch(queue, "ours").should_enqueue_at_front()
        assert queue.enqueue_at(LATER, "a", job_id="ours").status() is JobStatus.SCHEDULED
        assert registry.count == 2


def test_rqs_scheduler_puts_it_on_its_queue_when_its_time_has_come(queue: EmbedQueue, drain: Drain) -> None:
    waiting = queue.enqueue("waiting")
    job = queue.enqueue_in(3600, "a", at_front=True, ttl=70)
    assert queue._redis.ttl(keys.job(job.id)) == -1
    scheduler = RQScheduler(["embed"], connection=queue._client, serializer=EmbedSerializer)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    assert job.status() is JobStatus.SCHEDULED
    queue._redis.zadd(keys.scheduled("embed"), {job.id: 1})
    scheduler.enqueue_scheduled_jobs()
    assert queue._redis.lrange(keys.queue("embed"), 0, -1) == [job.id.encode(), waiting.id.encode()]
    assert 0 < queue._redis.ttl(keys.job(job.id)) <= 70
    drain()
    assert len(job.result(timeout=0)) == 1


def test_our_worker_runs_it_when_its_time_has_come(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    start()
    until(lambda: workers(queue))
    job = queue.enqueue_in(0.3, "a", ttl=100)
    assert job.status() is JobStatus.SCHEDULED
    assert len(job.result(timeout=20)) == 1


def test_a_delay_is_counted_by_the_servers_clock(queue: EmbedQueue) -> None:
    now_s = queue._redis.time()[0]
    for delay in (90, 90.0, timedelta(minutes=1, seconds=30)):
        job = queue.enqueue_in(delay, "a")
        assert 90 <= queue._redis.zscore(keys.scheduled("embed"), job.id) - now_s <= 120
    many = queue.enqueue_many(["a", "b"], delay=90)
    assert {job.status() for job in many} == {JobStatus.SCHEDULED}
    assert queue.enqueue_in(0, "a").status() is JobStatus.QUEUED
    assert queue.enqueue_at(datetime(2020, 1, 1, tzinfo=UTC), "a").status() is JobStatus.QUEUED


def test_a_moment_has_a_time_zone(queue: EmbedQueue) -> None:
    there = LATER.astimezone(timezone(timedelta(hours=-7)))
    job = queue.enqueue_at(there, "a")
    assert queue._redis.zscore(keys.scheduled("embed"), job.id) == LATER.timestamp()
    for moment in (LATER.replace(tzinfo=None), 12.0, "2090-01-31", None):
        with pytest.raises(InvalidOptionError, match="a datetime with a time zone"):
            queue.enqueue_at(moment, "a")  # type: ignore[arg-type]
    for delay in (-1, float("nan"), float("inf"), True, "5", timedelta(days=-1)):
        with pytest.raises(InvalidOptionError, match="seconds or a timedelta"):
            queue.enqueue_in(delay, "a")  # type: ignore[arg-type]
    assert queue._redis.zcard(keys.scheduled("embed")) == 1


def test_a_delayed_job_can_be_canceled_and_then_starts_at_once(queue: EmbedQueue) -> None:
    job = queue.enqueue_in(60, "a")
    assert job.cancel() is True
    assert queue._redis.zcard(keys.scheduled("embed")) == 0
    job.requeue()
    assert (job.status(), queue.depth()) == (JobStatus.QUEUED, 1)


# --- dependencies


def test_a_dependent_job_is_deferred_as_by_rq_and_runs_after_the_other(each_url: str, drain: Drain) -> None:
    with EmbedQueue(each_url) as queue:
        first, second = queue.enqueue_many(["a", "b"], job_ids=["first", "second"])
        job = queue.enqueue("c", job_id="ours", depends_on=[first, "second"])
        again = queue.enqueue("c", job_id="ours", depends_on=[first, "second"])
        rq_queue(queue).enqueue(TASK, kwargs={"texts": ["c"]}, job_id="theirs", depends_on=["first", "second"])
        assert again.status() is JobStatus.DEFERRED
        assert set(DeferredJobRegistry("embed", connection=queue._client).get_job_ids()) == {"ours", "theirs"}
        ours, theirs = fetch(queue, "ours"), fetch(queue, "theirs")
        assert ours._dependency_ids == theirs._dependency_ids == ["first", "second"]
        assert set(ours.dependency_ids) == set(theirs.dependency_ids) == {"first", "second"}
        assert queue._redis.smembers(keys.dependents("first")) == {b"ours", b"theirs"}
        assert queue.depth() == 2
        drain(at=each_url)
        assert len(job.result(timeout=0)) == 1
        assert queue._redis.zcard(keys.deferred("embed")) == 0
        assert second.status() is JobStatus.FINISHED


def test_a_dependency_that_has_finished_is_no_reason_to_wait(queue: EmbedQueue, drain: Drain) -> None:
    first = queue.enqueue("a")
    drain()
    job = queue.enqueue("b", depends_on=first)
    assert (job.status(), queue.depth()) == (JobStatus.QUEUED, 1)
    assert not queue._redis.exists(keys.dependents(first.id))


def test_a_dependency_that_is_not_there_refuses_the_call(queue: EmbedQueue) -> None:
    first = queue.enqueue("a")
    with pytest.raises(JobNotFoundError, match="there is no job nobody to depend on"):
        queue.enqueue_many(["b", "c"], depends_on=[first.id, "nobody"])
    assert queue.depth() == 1
    assert queue._redis.zcard(keys.deferred("embed")) == 0


def test_a_job_waits_on_after_a_dependency_that_failed_until_that_is_requeued(queue: EmbedQueue, drain: Drain) -> None:
    first = queue.enqueue("a", dimensions=99, failure_ttl=500)
    early = queue.enqueue("b", depends_on=first)
    drain()
    late = queue.enqueue("c", depends_on=first)
    drain()
    assert {early.status(), late.status()} == {JobStatus.DEFERRED}
    assert 0 < queue._redis.ttl(keys.dependents(first.id)) <= 500
    first.requeue()
    assert queue._redis.ttl(keys.dependents(first.id)) == -1
    drain(model="noop:128")
    assert {early.status(), late.status()} == {JobStatus.FINISHED}


def test_what_cannot_be_a_dependency_is_refused(queue: EmbedQueue) -> None:
    with pytest.raises(InvalidJobIdError):
        queue.enqueue("a", depends_on=["a b"])
    with pytest.raises(InvalidJobIdError, match="neither a job id nor a list"):
        queue.enqueue("a", depends_on=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="exclude each other"):
        queue.enqueue_in(5, "a", depends_on=queue.enqueue("b"))


# --- retries and callbacks in RQ's fields


def test_intervals_and_callbacks_stand_in_rqs_fields(queue: EmbedQueue) -> None:
    job = queue.enqueue("a", retries=3, retry_intervals=[10, 60], on_success="app.jobs.done", on_failure="app.jobs.sad")
    seen = fetch(queue, job.id)
    assert (seen.retries_left, seen.retry_intervals, seen.get_retry_interval()) == (3, [10, 60], 10)
    assert (seen._success_callback_name, seen._failure_callback_name) == ("app.jobs.done", "app.jobs.sad")
    assert seen.success_callback_timeout == seen.failure_callback_timeout == 60


def test_a_failed_attempt_waits_for_its_interval(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("a", retries=1, retry_intervals=[300])
    from embedq.worker.claims import ClaimStore

    ClaimStore(queue._client, "w", 30).claim(["embed"], 1, 10**9)
    [pair] = queue._redis.zrange(keys.started("embed"), 0, -1)
    queue._redis.zadd(keys.started("embed"), {pair: 1})
    drain()
    assert job.status() is JobStatus.SCHEDULED
    assert 290 <= queue._redis.zscore(keys.scheduled("embed"), job.id) - queue._redis.time()[0] <= 301


@pytest.mark.parametrize(
    "keywords",
    [
        {"on_success": "done"},
        {"on_success": print},
        {"on_failure": "os.system('x')"},
        {"retry_intervals": 5},
        {"retry_intervals": [-1]},
        {"retry_intervals": [1.5]},
        {"group": ""},
        {"group": 3},
        {"dedupe": 1},
    ],
)
def test_settings_that_cannot_be_are_refused(queue: EmbedQueue, keywords: dict) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(keywords))):
        queue.enqueue("a", **keywords)
    assert queue._redis.dbsize() == 0
