"""Limits: of the queue's length, and of the memory of the server."""

from __future__ import annotations

import threading
import time

import pytest

from embedq.producer import (
    EmbedQueue,
    InvalidOptionError,
    JobStatus,
    PartialEnqueueError,
    QueueFull,
    QueueServerError,
    calls,
    keys,
    requests,
)
from tests.conftest import Drain


def all_keys(queue: EmbedQueue) -> set[bytes]:
    return set(queue._redis.keys("*"))


def test_a_full_queue_refuses_and_keeps_nothing_of_the_call(each_url: str) -> None:
    with EmbedQueue(each_url, max_depth=3) as queue:
        queue.enqueue_many(["a", "b"])
        before = all_keys(queue)
        with pytest.raises(QueueFull, match="queue embed has 2 jobs and takes 3 at most; try again later") as caught:
            queue.enqueue_many(["c", "d"])
        assert (caught.value.code, caught.value.retryable) == ("queue_full", True)
        assert all_keys(queue) == before
        queue.enqueue("c")
        queue.enqueue("one more", max_depth=None)
        with pytest.raises(QueueFull):
            queue.enqueue("d")
        assert queue.depth() == 4


def test_delayed_jobs_count_and_jobs_that_are_there_need_no_room(queue: EmbedQueue) -> None:
    queue.enqueue_in(60, "later")
    queue.enqueue("a", job_id="a", max_depth=2)
    assert queue.enqueue("a", job_id="a", max_depth=2).id == "a"
    with pytest.raises(QueueFull, match="has 2 jobs"):
        queue.enqueue("b", max_depth=2)


def test_a_call_can_wait_for_room(queue: EmbedQueue, drain: Drain, url: str) -> None:
    queue.enqueue_many([str(number) for number in range(8)])
    jobs = []

    def later() -> None:
        with EmbedQueue(url, max_depth=8, block_timeout=20) as other:
            jobs.extend(other.enqueue_many([f"late {number}" for number in range(16)]))

    thread = threading.Thread(target=later)
    thread.start()
    while thread.is_alive():
        drain()
        assert queue.depth() <= 8
        thread.join(0.05)
    drain()
    assert len(jobs) == 16
    assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.FINISHED}


def test_waiting_for_room_ends_and_asks_ever_more_seldom(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[calls.Step] = []
    do = queue._do
    monkeypatch.setattr(queue, "_do", lambda step: (steps.append(step), do(step))[1])
    queue.enqueue("a")
    began = time.monotonic()
    with pytest.raises(QueueFull, match=r"also after 0\.7 s"):
        queue.enqueue("b", max_depth=1, block_timeout=0.7)
    assert 0.7 <= time.monotonic() - began < 10
    pauses = [step.seconds for step in steps if isinstance(step, calls.Pause)]
    assert 5 <= len(pauses) <= 12
    assert sum(pauses) <= 0.71
    assert queue.depth() == 1


def test_a_queue_that_fills_between_chunks_names_the_jobs_that_got_through(
    queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "CHUNK_JOBS", 2)
    with pytest.raises(PartialEnqueueError, match="4 of 7 jobs are enqueued; then: queue embed has 4") as caught:
        queue.enqueue_many([str(number) for number in range(7)], max_depth=5)
    assert caught.value.retryable
    assert len(caught.value.job_ids) == queue.depth() == 4


def test_embed_that_finds_no_room_half_way_leaves_nothing_waiting(
    queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "CHUNK_JOBS", 2)
    with pytest.raises(QueueFull):
        queue.embed(["a"] * 64 * 5, max_depth=3)
    with pytest.raises(QueueFull):
        list(queue.embed_stream(["a"] * 5, texts_per_job=1, max_depth=3))
    assert queue.depth() == 0


@pytest.mark.parametrize(
    "limits", [{"max_depth": 0}, {"max_depth": 2.5}, {"max_depth": True}, {"block_timeout": -1}, {"block_timeout": "x"}]
)
def test_a_limit_that_is_none_is_refused_at_once(url: str, limits: dict) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(limits))):
        EmbedQueue(url, **limits)


def test_a_producer_that_floods_a_small_redis_is_refused_with_nothing_half_enqueued(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        used = queue._redis.info("memory")["used_memory"]
        queue._redis.config_set("maxmemory", used + 3_000_000)
        queue._redis.config_set("maxmemory-policy", "noeviction")
        try:
            with pytest.raises(PartialEnqueueError, match="is out of memory") as caught:
                queue.enqueue_many(["word " * 100] * 20_000, group="flood")
            known = caught.value.job_ids
            assert caught.value.retryable
            # Canceling and requeueing need memory too: they change all or nothing.
            with pytest.raises(QueueServerError, match="is out of memory"):
                queue.cancel(known[0])
        finally:
            queue._redis.config_set("maxmemory", 0)
        waiting = [entry.decode() for entry in queue._redis.lrange(keys.queue("embed"), 0, -1)]
        assert waiting == known
        assert {key.decode() for key in queue._redis.scan_iter("rq:job:*")} == {keys.job(job_id) for job_id in known}
        assert queue._redis.scard("rq:group:flood") == len(known)
        assert queue.status(known[0]) is JobStatus.QUEUED
