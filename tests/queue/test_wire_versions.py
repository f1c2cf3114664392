"""Workers and clients of several wire versions on one queue: what an older worker cannot read waits for a newer one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from embedq.producer import EmbedQueue, JobFailedError, JobStatus, NewerVersionError, QueueFull, WireError, keys, wire
from embedq.worker.promotion import Promoter
from tests.conftest import Drain

NEWER = wire.VERSION + 1


@pytest.fixture
def queue(each_url: str) -> Iterator[EmbedQueue]:
    with EmbedQueue(each_url) as client:
        yield client


@pytest.fixture
def drain(drain: Drain, each_url: str) -> Drain:
    return lambda *queues, **settings: drain(*queues, at=each_url, **settings)


def request(version: int, text: str = "a") -> bytes:
    return orjson.dumps([wire.FUNCTION, None, [], {"texts": [text], "version": version}])


def enqueue(queue: EmbedQueue, job_id: str, version: int = NEWER, **options: Any) -> None:
    """As a client of that version does it."""
    queue.enqueue("a", job_id=job_id, **options)
    queue._redis.hset(keys.job(job_id), "data", request(version))


def parked(queue: EmbedQueue) -> dict[str, float]:
    found = queue._redis.zrange(keys.parked("embed"), 0, -1, withscores=True)
    return {job_id.decode(): version for job_id, version in found}


def waiting(queue: EmbedQueue) -> list[str]:
    return [entry.decode() for entry in queue._redis.lrange(keys.queue("embed"), 0, -1)]


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs from here on is of the next version."""
    monkeypatch.setattr(wire, "VERSION", NEWER)


def test_an_older_worker_leaves_newer_jobs_and_does_the_others(
    queue: EmbedQueue, drain: Drain, caplog: pytest.LogCaptureFixture
) -> None:
    enqueue(queue, "new-1")
    enqueue(queue, "new-2")
    old = queue.enqueue("old")
    with caplog.at_level(logging.WARNING, "embedq.worker"):
        worker = drain()
    assert old.status() == JobStatus.FINISHED
    assert parked(queue) == {"new-1": NEWER, "new-2": NEWER}
    assert queue.statuses(["new-1", "new-2"]) == {"new-1": JobStatus.QUEUED, "new-2": JobStatus.QUEUED}
    assert (worker.successful_job_count, worker.failed_job_count) == (1, 0)
    assert f"2 jobs are of a later wire version than {wire.VERSION}" in caplog.text
    tried = queue._redis.hmget(keys.job("new-1"), "embedq_attempts", "retries_left", "worker_name")
    assert tried == [None, b"3", b""]
    assert not queue._redis.zcard(keys.started("embed"))
    assert not list(queue._redis.scan_iter("rq:execution*"))


def test_a_newer_worker_takes_up_what_was_left_in_the_order_of_its_arrival(queue: EmbedQueue, drain: Drain) -> None:
    for name in ("z", "m", "a"):
        enqueue(queue, name)
    drain()
    later = queue.enqueue("later")
    newer_promoter = Promoter(queue._client, ["embed"])
    assert newer_promoter.round() == 0  # still this version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "VERSION", NEWER)
        assert newer_promoter.round() == 3
    assert waiting(queue) == ["z", "m", "a", later.id]
    assert parked(queue) == {}


@pytest.mark.usefixtures("newer")
def test_a_newer_worker_does_the_jobs_of_both_versions(queue: EmbedQueue, drain: Drain) -> None:
    enqueue(queue, "old", NEWER - 1)
    enqueue(queue, "new", NEWER)
    queue._redis.lrem(keys.queue("embed"), 0, "new")
    queue._redis.zadd(keys.parked("embed"), {"new": NEWER})
    Promoter(queue._client, ["embed"]).round()
    drain()
    assert queue.result("old", timeout=0).model == queue.result("new", timeout=0).model == "noop:8"


@pytest.mark.usefixtures("newer")
def test_what_is_newer_still_stays(queue: EmbedQueue) -> None:
    enqueue(queue, "newest", NEWER + 1)
    queue._redis.zadd(keys.parked("embed"), {"newest": NEWER + 1})
    assert Promoter(queue._client, ["embed"]).round() == 0
    assert parked(queue) == {"newest": NEWER + 1}


def test_a_parked_job_can_be_canceled_and_waits_no_longer_than_its_ttl(queue: EmbedQueue, drain: Drain) -> None:
    enqueue(queue, "canceled")
    enqueue(queue, "expired", ttl=100)
    drain()
    assert 0 < queue._redis.ttl(keys.job("expired")) <= 100
    assert queue.cancel("canceled")
    assert parked(queue) == {"expired": NEWER}
    queue._redis.delete(keys.job("expired"))
    Promoter(queue._client, ["embed"]).round()
    assert parked(queue) == {}


def test_parked_jobs_count_as_waiting_where_a_queue_is_bounded(queue: EmbedQueue, drain: Drain) -> None:
    enqueue(queue, "new-1")
    enqueue(queue, "new-2")
    drain()
    with pytest.raises(QueueFull):
        queue.enqueue("b", max_depth=2)
    queue.enqueue("b", max_depth=3)


def test_a_job_that_was_tried_before_is_left_as_well(queue: EmbedQueue, drain: Drain) -> None:
    enqueue(queue, "tried")
    queue._redis.hset(keys.job("tried"), mapping={"embedq_attempts": 3, "retries_left": 0})
    drain()
    assert parked(queue) == {"tried": NEWER}


def test_another_type_under_our_key_breaks_nothing(queue: EmbedQueue, drain: Drain) -> None:
    queue._redis.set(keys.parked("embed"), "planted")
    assert Promoter(queue._client, ["embed"]).round() == 0
    enqueue(queue, "new")
    queue._redis.set(keys.parked("embed"), "planted")
    drain()
    assert parked(queue) == {"new": NEWER}


def test_what_rq_put_back_itself_is_struck_off(queue: EmbedQueue, drain: Drain) -> None:
    enqueue(queue, "new")
    drain()
    queue._redis.hset(keys.job("new"), "status", "finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "VERSION", NEWER)
        assert Promoter(queue._client, ["embed"]).round() == 0
    assert (parked(queue), waiting(queue)) == ({}, [])


@pytest.mark.parametrize("version", [0, -1, "2", True, 2.0, None, wire.MAX_VERSION + 1])
def test_no_version_of_ours_fails(queue: EmbedQueue, drain: Drain, version: Any) -> None:
    enqueue(queue, "foreign", version)
    drain()
    with pytest.raises(JobFailedError, match="this worker reads"):
        queue.result("foreign", timeout=0)
    assert parked(queue) == {}


def test_a_newer_result_is_refused_with_what_to_do(queue: EmbedQueue, drain: Drain) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "RESULT_VERSION", 2)
        job = queue.enqueue("a")
        drain()
    with pytest.raises(NewerVersionError, match=r"version 2, this client reads up to 1: update embedq") as caught:
        job.result(timeout=0)
    assert isinstance(caught.value, WireError)
    assert caught.value.version == 2
