"""Failed jobs: found by why and when they failed, put back, deleted; whatever stands in the registry."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from rq.utils import utcformat

from embedq.producer import (
    EmbedQueue,
    InvalidJobIdError,
    JobFailedError,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    failed,
    keys,
    scripts,
    wire,
)
from embedq.producer.connection import connect
from embedq.producer.failed import PAGE_JOBS, Filter
from tests.conftest import Drain, until
from tests.queue.hostile import NONSENSE


@pytest.fixture
def client(each_url: str) -> Iterator[Any]:
    with connect(each_url) as client:
        yield client


def plant_failed(
    client: Any, *ids: str, queue: str = "embed", code: str = "encode_failed", ago_s: float = 0, **fields: Any
) -> None:
    """As a worker leaves them."""
    now = client.time()[0] - ago_s
    pipeline = client.pipeline(transaction=False)
    reason = wire.encode_exc_string(JobFailedError(f"because of {code}", code=code, text_index=2))
    for job_id in ids:
        told = {
            "status": "failed",
            "origin": queue,
            "data": "x" * 10,
            "embedq_texts": 3,
            "embedq_retries": 3,
            "retries_left": 0,
            "ended_at": utcformat(datetime.fromtimestamp(now, UTC)),
            **fields,
        }
        pipeline.hset(keys.job(job_id), mapping=told)
        pipeline.xadd(keys.results(job_id), {"type": 2, "worker_name": "w", "exc_string": reason})
        pipeline.zadd(keys.failed(queue), {job_id: now + 1000})
    pipeline.sadd(keys.QUEUES, keys.queue(queue))
    pipeline.execute()


def ids_of(jobs: Any) -> list[str]:
    return [job.id for job in jobs]


def test_a_job_that_a_worker_gave_up_on_tells_why_when_and_after_how_many_attempts(
    client: Any, each_url: str, drain: Drain
) -> None:
    with EmbedQueue(each_url) as queue:
        job = queue.enqueue(["a", "b"], dimensions=1000, retries=2)
        drain(at=each_url)
        [found] = failed.find(client, Filter())
        assert (found.id, found.queue, found.code, found.texts, found.attempts) == (
            job.id,
            "embed",
            "unsupported_option",
            2,
            1,
        )
        assert "1000" in found.message
        assert found.age_s is not None
        assert found.age_s < 60
        told = failed.details(client, job.id)
    assert (told["id"], told["data_bytes"] > 0, 0 < told["expires_in_s"] <= 604_800) == (job.id, True, True)
    assert told["worker_name"]
    assert "data" not in told


def test_attempts_are_those_counted_or_those_that_the_retries_tell(client: Any) -> None:
    plant_failed(client, "counted", embedq_attempts=5, retries_left=1)
    plant_failed(client, "told", retries_left=1)
    plant_failed(client, "odd", embedq_attempts="x", retries_left="9" * 30, embedq_texts="-")
    attempts = {job.id: job.attempts for job in failed.find(client, Filter())}
    assert attempts == {"counted": 6, "told": 3, "odd": 4}


def test_jobs_are_found_by_queue_code_and_age_the_latest_first(client: Any) -> None:
    plant_failed(client, "old", ago_s=1000, code="abandoned")
    plant_failed(client, "new", ago_s=10)
    plant_failed(client, "newest", code="out_of_memory")
    plant_failed(client, "other", queue="urgent")
    plant_failed(client, "timeless", ended_at="soon", ago_s=20)
    for wanted, ids in (
        (Filter(), ["newest", "new", "timeless", "old", "other"]),
        (Filter(queues=("urgent", "nobody")), ["other"]),
        (Filter(codes=frozenset({"abandoned", "out_of_memory"})), ["newest", "old"]),
        (Filter(older_than_s=500), ["old"]),
        (Filter(newer_than_s=500), ["newest", "new", "other"]),
        (Filter(older_than_s=5, newer_than_s=500), ["new"]),
        (Filter(codes=frozenset({"abandoned"}), newer_than_s=500), []),
    ):
        assert ids_of(failed.find(client, wanted)) == ids
    assert ids_of(failed.latest(client, "embed", 2)) == ["newest", "new"]


def test_a_long_registry_is_read_page_by_page_and_each_job_comes_once(client: Any) -> None:
    number = 3 * PAGE_JOBS + 7
    plant_failed(client, *(f"job-{place}" for place in range(number)))
    client.config_resetstat()
    found = failed.find(client, Filter())
    next(found)
    assert client.info("commandstats")["cmdstat_hmget"]["calls"] == PAGE_JOBS
    assert len(set(ids_of(found))) == number - 1


def test_what_is_put_back_or_deleted_while_it_is_found_hides_no_other(client: Any) -> None:
    number = 2 * PAGE_JOBS + 100
    plant_failed(client, *(f"job-{place}" for place in range(number)))
    plant_failed(client, *(f"later-{place}" for place in range(100)))
    assert failed.purge(client, failed.find(client, Filter())) == (number + 100, 0)
    assert client.zcard(keys.failed("embed")) == 0


def test_requeued_jobs_have_their_retries_again(client: Any) -> None:
    plant_failed(client, "a", "b")
    jobs = list(failed.find(client, Filter()))
    client.hset(keys.job("b"), "status", "queued")
    assert failed.requeue(client, jobs) == (1, 1)
    assert client.hget(keys.job("a"), "retries_left") == b"3"
    assert client.lrange(keys.queue("embed"), 0, -1) == [b"a"]
    assert client.zscore(keys.failed("embed"), "a") is None


def test_a_purged_job_leaves_nothing_behind(client: Any, each_url: str, drain: Drain) -> None:
    with EmbedQueue(each_url) as queue:
        other, first = queue.enqueue("a", group="g"), queue.enqueue("first")
        bad = queue.enqueue("b", group="g", dimensions=1000, depends_on=[first])
        drain(at=each_url)
        until(lambda: drain(at=each_url) and bad.status() is JobStatus.FAILED)
        client.zadd(keys.executions(bad.id), {"e": 1})
        client.hset(keys.execution(bad.id, "e"), "worker_name", "w")
        client.sadd(keys.worker_executions("w"), f"{bad.id}:e")
        assert failed.purge(client, failed.fetch(client, [bad.id])) == (1, 0)
        assert client.keys(f"*{bad.id}*") == []
        assert client.keys("*execution*") == []
        assert client.zcard(keys.failed("embed")) == 0
        assert queue.group("g").job_ids() == [other.id]
        assert other.status() is JobStatus.FINISHED


def test_a_job_that_was_requeued_or_failed_anew_is_not_deleted(client: Any, each_url: str) -> None:
    plant_failed(client, "requeued", "again", "gone", "canceled", "followed")
    jobs = list(failed.find(client, Filter()))
    with EmbedQueue(each_url) as queue:
        queue.requeue("requeued")
    client.hset(keys.job("again"), "ended_at", "2030-01-31T23:59:59.123456Z")
    client.hset(keys.job("canceled"), "status", "canceled")
    client.delete(keys.job("gone"))
    client.zadd(keys.sequels("embed"), {"followed": 1})
    assert failed.purge(client, jobs) == (1, 4)
    assert all(client.exists(keys.job(job_id)) for job_id in ("requeued", "again", "canceled", "followed"))
    assert client.zscore(keys.failed("embed"), "gone") is None


def test_purging_sent_twice_after_a_lost_reply_tells_the_same(client: Any) -> None:
    plant_failed(client, "a")
    [job] = failed.find(client, Filter())
    script = scripts.load(client, "embedq.producer", "purge")
    args = [keys.PREFIX, job.queue, job.id, job.ended_at]
    assert [script(keys=[], args=args) for _ in range(2)] == [[1], [1]]


def test_a_stopped_job_and_one_without_a_reason_have_a_code_too(client: Any) -> None:
    plant_failed(client, "stopped", status="stopped")
    plant_failed(client, "silent")
    plant_failed(client, "odd")
    client.delete(keys.results("silent"))
    client.xadd(keys.results("odd"), {"type": 2, "exc_string": "not base64"})
    assert {job.id: job.code for job in failed.find(client, Filter())} == {
        "stopped": "stopped",
        "silent": "unknown",
        "odd": "unknown",
    }


def test_keys_of_other_types_and_ids_that_are_none_are_passed_over(client: Any) -> None:
    plant_failed(client, "good", "list", "string")
    for key in (keys.job("list"), keys.results("string")):
        client.delete(key)
        client.rpush(key, "x")
    client.zadd(keys.failed("embed"), {b"\xff\xfe": 1, "a b": 1, "x" * 10_000: 1, "vanished": 1, "": 1})
    client.set(keys.failed("foreign"), "x")
    client.sadd(keys.QUEUES, keys.queue("foreign"), b"\xff")
    assert {job.id: job.code for job in failed.find(client, Filter())} == {"good": "encode_failed", "string": "unknown"}
    assert failed.purge(client, failed.find(client, Filter())) == (2, 0)
    assert client.type(keys.job("list")) == b"list"
    client.delete(keys.QUEUES)
    client.set(keys.QUEUES, "x")
    assert list(failed.find(client, Filter())) == []


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_in_any_field_of_a_failed_job_harms_nobody(client: Any, value: bytes) -> None:
    names = ("ended_at", "embedq_attempts", "embedq_retries", "retries_left", "embedq_texts", "group_id", "description")
    plant_failed(client, "good")
    plant_failed(client, "odd", **dict.fromkeys(names, value))
    client.delete(keys.results("odd"))
    client.xadd(keys.results("odd"), {"type": 2, "exc_string": value})
    assert {job.id for job in failed.find(client, Filter(older_than_s=0))} >= {"good"}
    assert failed.details(client, "odd")["id"] == "odd"
    assert failed.purge(client, failed.find(client, Filter())) == (2, 0)


def test_only_a_failed_job_can_be_asked_for(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue("a", job_id="waiting")
    with pytest.raises(JobNotFoundError, match="no job nobody"):
        failed.details(client, "nobody")
    with pytest.raises(JobStateError, match="job waiting is queued"):
        failed.fetch(client, ["waiting"])
    with pytest.raises(InvalidJobIdError):
        failed.fetch(client, ["a b"])


def test_a_job_that_others_wait_for_is_not_purged(queue: EmbedQueue, drain: Drain) -> None:
    first = queue.enqueue("a", prompt_name="unknown", retries=0)
    then = queue.enqueue("b", depends_on=first)
    drain()
    assert (first.status(), then.status()) == (JobStatus.FAILED, JobStatus.DEFERRED)
    assert failed.purge(queue._client, failed.find(queue._client, Filter())) == (0, 1)
    assert (first.status(), then.status()) == (JobStatus.FAILED, JobStatus.DEFERRED)
