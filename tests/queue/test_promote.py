"""Scheduled jobs onto their queues when their time comes, on every Redis at hand, alone and beside RQ's scheduler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from rq import Queue, Retry
from rq.job import Job
from rq.rate_limit import RateLimit, RateLimitRegistry
from rq.scheduler import RQScheduler

from embedq.producer import EmbedQueue, EmbedSerializer, JobStatus, keys
from embedq.worker import promotion
from embedq.worker.claims import ClaimStore
from embedq.worker.promotion import Promoted, Promoter
from tests.conftest import Drain, until
from tests.queue.test_rq import rq_command
from tests.queue.test_worker import Start, idle_workers, start  # noqa: F401

EMBED = "embedq.worker.tasks.embed"
MANY = 10**9


@pytest.fixture
def queue(each_url: str) -> Iterator[EmbedQueue]:
    with EmbedQueue(each_url) as client:
        yield client


@pytest.fixture
def promoter(queue: EmbedQueue) -> Promoter:
    return Promoter(queue._client, ["urgent", "embed"])


def theirs(queue: EmbedQueue, name: str = "embed") -> Queue:
    return Queue(name, connection=queue._client, serializer=EmbedSerializer)


def schedule(queue: EmbedQueue, in_s: float, name: str = "embed", **options: Any) -> Job:
    """A job that is due so many seconds from the server's now."""
    job = theirs(queue, name).enqueue_in(timedelta(hours=1), EMBED, kwargs={"texts": ["a"]}, **options)
    queue._redis.zadd(keys.scheduled(name), {job.id: queue._redis.time()[0] + in_s})
    return job


def waiting(queue: EmbedQueue, name: str = "embed") -> list[str]:
    return [entry.decode() for entry in queue._redis.lrange(keys.queue(name), 0, -1)]


def test_names_of_rate_limits_are_rqs(queue: EmbedQueue) -> None:
    registry = RateLimitRegistry("x", queue._client)
    assert (keys.RATE_LIMITS, keys.rate_limit("x")) == (registry.rl_keys_key, registry.config_key)
    assert registry.rate_limited_key == keys.rate_limit("x") + ":rate_limited"


def test_due_jobs_of_all_queues_move_and_others_wait(queue: EmbedQueue, promoter: Promoter) -> None:
    later, due = schedule(queue, 600), schedule(queue, -5)
    urgent, foreign = schedule(queue, 0, "urgent"), schedule(queue, -5, "foreign")
    queue._redis.delete(keys.QUEUES)
    promoted = promoter.promote()
    assert (promoted.moved, promoted.struck_off) == (2, 0)
    assert 595 < promoted.next_due_s <= 600
    assert (waiting(queue), waiting(queue, "urgent"), waiting(queue, "foreign")) == ([due.id], [urgent.id], [])
    assert [job.get_status() for job in (due, urgent, later, foreign)] == ["queued", "queued", "scheduled", "scheduled"]
    assert queue._redis.smembers(keys.QUEUES) == {keys.queue("embed").encode(), keys.queue("urgent").encode()}
    due.refresh()
    assert due.enqueued_at is not None
    assert abs(due.enqueued_at.timestamp() - queue._redis.time()[0]) < 5
    assert promoter.promote().moved == 0


def test_without_scheduled_jobs_there_is_nothing_to_wait_for(promoter: Promoter) -> None:
    assert promoter.promote() == Promoted(0, -1.0, 0)


def test_jobs_come_out_in_the_order_of_their_times(queue: EmbedQueue, promoter: Promoter) -> None:
    second, first = schedule(queue, -1), schedule(queue, -2)
    front = schedule(queue, -1, at_front=True)
    promoter.promote()
    assert waiting(queue) == [front.id, first.id, second.id]


def test_what_vanished_was_canceled_or_waits_already_is_struck_off(queue: EmbedQueue, promoter: Promoter) -> None:
    vanished, canceled, queued = schedule(queue, -3), schedule(queue, -2), schedule(queue, -1)
    queue._redis.delete(keys.job(vanished.id))
    queue._redis.hset(keys.job(canceled.id), "status", "canceled")
    queue._redis.hset(keys.job(queued.id), "status", "queued")
    queue._redis.zadd(keys.scheduled("embed"), {"no-hash": 1})
    queue._redis.set(keys.job("no-hash"), "a string")
    assert promoter.promote() == Promoted(0, -1.0, 4)
    assert waiting(queue) == []
    assert queue._redis.exists(keys.job(vanished.id)) == 0


def test_a_flood_of_due_jobs_is_moved_in_bounded_calls(
    queue: EmbedQueue, promoter: Promoter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "PROMOTE_JOBS", 3)
    monkeypatch.setattr(promotion, "CALLS_PER_ROUND", 2)
    jobs = [schedule(queue, number - 100, name) for name in ("urgent", "embed") for number in range(4)]
    assert promoter.promote() == Promoted(3, 0.0, 0)
    assert (promoter.round(), promoter.round()) == (5, 0)
    assert waiting(queue, "urgent") + waiting(queue) == [job.id for job in jobs]


def test_a_waiting_jobs_ttl_runs_from_its_promotion(queue: EmbedQueue, promoter: Promoter) -> None:
    job = schedule(queue, -1, ttl=500)
    queue._redis.persist(keys.job(job.id))
    promoter.promote()
    assert 490 < queue._redis.ttl(keys.job(job.id)) <= 500


def test_the_same_call_twice_moves_each_job_once(queue: EmbedQueue, promoter: Promoter) -> None:
    job = schedule(queue, -1)
    assert [promoter.promote().moved for _ in range(2)] == [1, 0]
    assert waiting(queue) == [job.id]


def test_a_rate_limited_job_waits_for_its_slot(queue: EmbedQueue, promoter: Promoter) -> None:
    limit = RateLimit("slots", concurrency=1)
    jobs = [schedule(queue, number - 10, rate_limit=limit) for number in range(3)]
    assert promoter.promote().moved == 3
    assert [job.get_status() for job in jobs] == ["queued", "rate_limited", "rate_limited"]
    assert waiting(queue) == [jobs[0].id]
    registry = RateLimitRegistry("slots", queue._client)
    assert (registry.concurrency, registry.get_allowed_job_ids()) == (1, [jobs[0].id])
    assert RateLimitRegistry.all(queue._client)[0].key == "slots"


@pytest.mark.parametrize("at_front", [False, True])
def test_a_retry_after_an_interval_goes_where_rqs_retry_says(
    queue: EmbedQueue, promoter: Promoter, at_front: bool
) -> None:
    job = theirs(queue).enqueue(
        EMBED, kwargs={"texts": ["a"]}, retry=Retry(max=2, interval=60, enqueue_at_front=at_front)
    )
    store = ClaimStore(queue._client, "w1", 30)
    [claim] = store.claim(["embed"], 1, MANY).claims
    queue._redis.zadd(keys.started("embed"), {f"{job.id}:{claim.execution_id}": 1})  # the worker died
    assert store.recover("embed").retried == 1
    assert job.get_status() == "scheduled"
    other = queue.enqueue("b")
    assert promoter.promote().moved == 0
    queue._redis.zadd(keys.scheduled("embed"), {job.id: 1})
    promoter.promote()
    assert waiting(queue) == ([job.id, other.id] if at_front else [other.id, job.id])


def test_an_immediate_retry_goes_to_the_front_where_rqs_retry_says(queue: EmbedQueue) -> None:
    job = theirs(queue).enqueue(EMBED, kwargs={"texts": ["a"]}, retry=Retry(max=1, enqueue_at_front=True))
    store = ClaimStore(queue._client, "w1", 30)
    [claim] = store.claim(["embed"], 1, MANY).claims
    queue._redis.zadd(keys.started("embed"), {f"{job.id}:{claim.execution_id}": 1})
    other = queue.enqueue("b")
    store.recover("embed")
    assert waiting(queue) == [job.id, other.id]


def test_beside_rqs_scheduler_every_job_is_done_once(queue: EmbedQueue, promoter: Promoter, drain: Drain) -> None:
    jobs = [schedule(queue, -1) for _ in range(300)]
    scheduler = RQScheduler([theirs(queue)], connection=queue._client, serializer=EmbedSerializer)
    scheduler._acquired_locks = {"embed"}
    scheduler._connection = queue._client
    barrier = threading.Barrier(3)

    def race(action: Any) -> None:
        barrier.wait()
        action()

    racers = [
        threading.Thread(target=race, args=[action])
        for action in (scheduler.enqueue_scheduled_jobs, promoter.round, promoter.round)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert set(waiting(queue)) == {job.id for job in jobs}  # some twice
    drain(at=_url(queue))
    assert {job.get_status() for job in jobs} == {"finished"}
    assert all(queue._redis.xlen(keys.results(job.id)) == 1 for job in jobs)


def test_a_job_that_stands_twice_on_its_queue_is_claimed_once(queue: EmbedQueue) -> None:
    job = queue.enqueue("a")
    queue._redis.rpush(keys.queue("embed"), job.id)
    store = ClaimStore(queue._client, "w1", 30)
    assert [claim.job_id for claim in store.claim(["embed"], 10, MANY).claims] == [job.id]
    assert waiting(queue) == []


def test_a_worker_does_a_delayed_job_when_it_is_due(
    queue: EmbedQueue,
    start: Start,  # noqa: F811
) -> None:
    start("urgent", "embed", at=_url(queue))
    until(lambda: idle_workers(queue))
    job = theirs(queue).enqueue_in(timedelta(seconds=1), EMBED, kwargs={"texts": ["a"]})
    assert queue.status(job.id) is JobStatus.SCHEDULED
    assert len(queue.result(job.id, timeout=20)) == 1


def test_a_worker_with_rqs_scheduler_beside_it_does_a_due_job_and_stops_it(queue: EmbedQueue) -> None:
    job = schedule(queue, -1)
    rq_command(
        _url(queue), "worker", "--burst", "--with-scheduler", "--worker-class", "embedq.worker.EmbedWorker", "embed"
    )
    assert queue.status(job.id) is JobStatus.FINISHED
    assert queue._redis.keys("rq:scheduler*") == []


def test_max_jobs_counts_jobs_that_came_by_promotion_too(
    queue: EmbedQueue,
    start: Start,  # noqa: F811
) -> None:
    jobs = [schedule(queue, -1) for _ in range(3)]
    status, output = start("--max-jobs", "2", at=_url(queue)).ended()
    assert status == 0, output
    assert sorted(job.get_status() for job in jobs) == ["finished", "finished", "queued"]


def _url(queue: EmbedQueue) -> str:
    return "unix://" + str(queue._client.connection_pool.connection_kwargs["path"])
