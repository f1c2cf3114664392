"""The worker's scripts against every Redis at hand: leases, fencing, idempotence, recovery, nothing left behind."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq.job import Job

from embedq.producer import EmbedQueue, EmbedSerializer, JobFailedError, JobStatus, keys
from embedq.worker.claims import STAGE_FROM_BYTES, Claim, ClaimStore, Outcome, Recovered
from tests.conftest import until

LEASE_S = 30.0
MANY = 10**9


@pytest.fixture
def queue(each_url: str) -> Iterator[EmbedQueue]:
    with EmbedQueue(each_url) as client:
        yield client


@pytest.fixture
def store(queue: EmbedQueue) -> ClaimStore:
    return ClaimStore(queue._client, "w1", LEASE_S)


def claim(store: ClaimStore, *queues: str, max_jobs: int = 100, max_bytes: int = MANY) -> list[Claim]:
    return store.claim(queues or ["embed"], max_jobs, max_bytes).claims


def done(claim: Claim) -> Outcome:
    return Outcome.finished(claim, b"result", 0.5)


def failed(claim: Claim, retryable: bool = False) -> Outcome:
    return Outcome.failed(claim, JobFailedError("broken", code="broken", retryable=retryable))


def leftovers(queue: EmbedQueue) -> set[str]:
    """Keys of executions: none may outlive its job's end."""
    patterns = ("*execution*", "*:wip:*")
    return {key.decode() for pattern in patterns for key in queue._redis.keys(pattern)}


def test_a_claim_is_a_lease_in_rqs_own_records(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    before = time.time()
    [claimed] = claim(store)
    assert (claimed.queue, claimed.job_id) == ("embed", job.id)
    assert claimed.queued_s >= 0
    fields = queue._redis.hgetall(keys.job(job.id))
    assert fields[b"status"] == b"started"
    assert fields[b"worker_name"] == b"w1"
    assert fields[b"data"] == claimed.data
    pair = f"{job.id}:{claimed.execution_id}"
    lease_end = queue._redis.zscore(keys.started("embed"), pair)
    assert before + LEASE_S - 1 <= lease_end <= time.time() + LEASE_S + 1
    assert queue._redis.smembers(keys.worker_executions("w1")) == {pair.encode()}
    assert queue._redis.hget(keys.execution(job.id, claimed.execution_id), "worker_name") == b"w1"
    assert queue._redis.zrange(keys.executions(job.id), 0, -1) == [claimed.execution_id.encode()]
    assert queue.depth() == 0


def test_queues_are_claimed_in_order_within_the_budget(queue: EmbedQueue, store: ClaimStore) -> None:
    with EmbedQueue(connection=queue._client, queue="urgent") as urgent:
        slow = queue.enqueue_many(["a", "b"])
        fast = urgent.enqueue_many(["c", "d"])
    assert [c.job_id for c in claim(store, "urgent", "embed", max_jobs=3)] == [*(j.id for j in fast), slow[0].id]
    assert [c.job_id for c in claim(store, "urgent", "embed")] == [slow[1].id]
    assert claim(store, "urgent", "embed") == []


def test_a_claim_stops_once_it_has_enough_bytes_but_takes_one_job_always(queue: EmbedQueue, store: ClaimStore) -> None:
    queue.enqueue_many(["text " * 50 + str(number) for number in range(5)])
    first = claim(store, max_bytes=1)
    assert len(first) == 1
    assert len(claim(store, max_bytes=2 * len(first[0].data))) == 2


def test_what_is_no_waiting_job_is_dropped_from_the_queue(queue: EmbedQueue, store: ClaimStore) -> None:
    job, twice = queue.enqueue_many(["a", "b"])
    queue._redis.set(keys.job("a-string"), "not a hash")
    for stray in ("vanished", "a-string", twice.id):
        queue._redis.rpush(keys.queue("embed"), stray)
    assert [c.job_id for c in claim(store)] == [job.id, twice.id]
    assert queue.depth() == 0


def test_a_hash_without_data_is_claimed_so_that_it_can_fail(queue: EmbedQueue, store: ClaimStore) -> None:
    queue._redis.hset(keys.job("broken"), mapping={"status": "queued", "origin": "embed"})
    queue._redis.rpush(keys.queue("embed"), "broken")
    [claimed] = claim(store)
    assert (claimed.job_id, claimed.data, claimed.queued_s) == ("broken", b"", 0.0)


def test_nothing_is_claimed_while_rq_is_suspended(queue: EmbedQueue, store: ClaimStore) -> None:
    queue.enqueue("text")
    queue._redis.set(keys.SUSPENDED, 1)
    assert store.claim(["embed"], 10, MANY).state == "suspended"
    assert queue.depth() == 1


def test_publishing_ends_a_job_once_and_leaves_no_execution(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    claims = claim(store)
    for _ in range(3):  # as if the reply had been lost
        assert store.publish([done(claims[0])]) == []
    assert job.status() is JobStatus.FINISHED
    assert queue._redis.xlen(keys.results(job.id)) == 1
    assert queue._redis.zcard(keys.finished("embed")) == 1
    assert leftovers(queue) == set()


def test_a_failure_without_retries_is_in_the_failed_registry(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text", retries=0)
    store.publish([failed(claim(store)[0], retryable=True)])
    assert job.status() is JobStatus.FAILED
    assert queue._redis.zscore(keys.failed("embed"), job.id) > time.time()
    assert leftovers(queue) == set()
    with pytest.raises(JobFailedError) as caught:
        job.result(timeout=0)
    assert caught.value.code == "broken"


def test_a_retryable_failure_waits_again_until_its_retries_are_used_up(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text", retries=2, ttl=500)
    for left in (1, 0):
        store.publish([failed(claim(store)[0], retryable=True)])
        assert job.status() is JobStatus.QUEUED
        assert queue._redis.hget(keys.job(job.id), "retries_left") == str(left).encode()
        assert queue._redis.ttl(keys.job(job.id)) > 0
        assert not queue._redis.exists(keys.results(job.id))
    store.publish([failed(claim(store)[0], retryable=True)])
    assert job.status() is JobStatus.FAILED
    assert leftovers(queue) == set()


def test_a_failure_that_no_retry_can_mend_fails_at_once(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text", retries=3)
    store.publish([failed(claim(store)[0], retryable=False)])
    assert job.status() is JobStatus.FAILED


def test_a_worker_that_lost_its_hold_changes_nothing(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    [old] = claim(store)
    queue._redis.zadd(keys.started("embed"), {f"{job.id}:{old.execution_id}": 1})  # the lease ran out
    other = ClaimStore(queue._client, "w2", LEASE_S)
    assert other.recover("embed") == Recovered(1, 1, 0, [])
    [new] = claim(other)
    assert store.renew([old], 60).lost == [old]
    store.publish([done(old)])
    assert len(store.release([old])) == 0
    assert job.status() is JobStatus.STARTED
    assert queue._redis.hget(keys.job(job.id), "worker_name") == b"w2"
    assert not queue._redis.exists(keys.results(job.id))
    other.publish([done(new)])
    assert job.status() is JobStatus.FINISHED
    assert queue._redis.xlen(keys.results(job.id)) == 1
    assert leftovers(queue) == set()


def test_a_job_canceled_while_it_runs_stays_canceled(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    [claimed] = claim(store)
    assert job.cancel() is True
    assert store.renew([claimed], 60).lost == [claimed]
    store.publish([done(claimed)])
    assert job.status() is JobStatus.CANCELED
    assert leftovers(queue) == set()


def test_released_jobs_are_at_the_head_again_in_their_order(queue: EmbedQueue, store: ClaimStore) -> None:
    jobs = queue.enqueue_many([str(number) for number in range(4)], ttl=500)
    claims = claim(store, max_jobs=3)
    assert queue._redis.ttl(keys.job(jobs[0].id)) == -1
    assert len(store.release(claims)) == 3
    waiting = [entry.decode() for entry in queue._redis.lrange(keys.queue("embed"), 0, -1)]
    assert waiting == [job.id for job in jobs]
    assert jobs[0].status() is JobStatus.QUEUED
    assert queue._redis.ttl(keys.job(jobs[0].id)) > 0
    assert len(store.release(claims)) == 0
    assert len(store.release([])) == 0
    assert leftovers(queue) == set()


def test_renewing_moves_the_end_of_the_lease(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    claims = claim(store)
    pair = f"{job.id}:{claims[0].execution_id}"
    queue._redis.zadd(keys.started("embed"), {pair: time.time() + 1})
    assert store.renew(claims, 60).lost == []
    assert queue._redis.zscore(keys.started("embed"), pair) > time.time() + LEASE_S - 5
    assert store.renew([], 60).lost == []


def test_a_heartbeat_does_not_bring_back_a_worker_that_is_gone(queue: EmbedQueue, store: ClaimStore) -> None:
    queue.enqueue("text")
    claims = claim(store)
    store.renew(claims, 60)
    store.publish([done(claims[0])])
    assert not queue._redis.exists(keys.worker("w1"))


def test_abandoned_jobs_wait_again_until_their_retries_are_used_up(queue: EmbedQueue, store: ClaimStore) -> None:
    again, last = queue.enqueue("a", retries=1), queue.enqueue("b", retries=0)
    for claimed in claim(store):
        queue._redis.zadd(keys.started("embed"), {f"{claimed.job_id}:{claimed.execution_id}": 1})
    assert store.recover("embed") == Recovered(2, 1, 1, [])
    assert store.recover("embed") == Recovered(0, 0, 0, [])
    assert again.status() is JobStatus.QUEUED
    with pytest.raises(JobFailedError, match="a worker died with the job in hand") as caught:
        last.result(timeout=0)
    assert caught.value.code == JobFailedError.ABANDONED
    assert leftovers(queue) == set()


def test_a_living_lease_is_left_alone(queue: EmbedQueue, store: ClaimStore) -> None:
    queue.enqueue("text")
    claim(store)
    queue._redis.zadd(keys.started("embed"), {"no-pair": 1})
    assert store.recover("embed") == Recovered(0, 0, 0, [])
    assert queue._redis.zcard(keys.started("embed")) == 2


def test_a_recovered_job_that_failed_is_told_if_it_names_a_callback(queue: EmbedQueue, store: ClaimStore) -> None:
    for number, name in enumerate(("app.hooks.failed", "")):
        fields = {"status": "started", "failure_callback_name": name, "data": "x"}
        queue._redis.hset(keys.job(f"theirs-{number}"), mapping=fields)
        queue._redis.zadd(keys.started("embed"), {f"theirs-{number}:0123abcd": 1})
    assert store.recover("embed") == Recovered(2, 0, 2, ["theirs-0"])


def test_jobs_left_alone_do_not_hide_those_behind_them(queue: EmbedQueue, store: ClaimStore) -> None:
    abandoned = {f"no-pair-{number}": number for number in range(700)}
    job = queue.enqueue("text")
    [claimed] = claim(store)
    queue._redis.zadd(keys.started("embed"), {**abandoned, f"{job.id}:{claimed.execution_id}": 1000})
    assert store.recover("embed") == Recovered(1, 1, 0, [])


def test_a_dead_stock_workers_job_is_taken_back_too(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    queue._redis.lpop(keys.queue("embed"))
    queue._redis.hset(keys.job(job.id), "status", "started")
    queue._redis.zadd(keys.started("embed"), {f"{job.id}:0123abcd": 1})
    assert store.recover("embed") == Recovered(1, 1, 0, [])
    assert job.status() is JobStatus.QUEUED


def test_a_claim_whose_reply_was_lost_is_told_again_in_its_order(
    queue: EmbedQueue, store: ClaimStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = queue.enqueue_many([str(number) for number in range(20)])
    script = store._claim

    def loses_the_reply(**call: Any) -> None:
        script(**call)
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(store, "_claim", loses_the_reply)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            claim(store, max_jobs=15)
    monkeypatch.undo()
    queue._redis.delete(keys.job(jobs[3].id))  # meanwhile
    told = claim(store, max_jobs=15)
    assert [c.job_id for c in told] == [job.id for job in jobs[:15] if job != jobs[3]]
    assert {c.queue for c in told} == {"embed"}
    store.publish([done(c) for c in told])
    assert [c.job_id for c in claim(store)] == [job.id for job in jobs[15:]]


def test_what_follows_a_job_is_told_again_after_a_lost_reply(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    queue._redis.sadd(keys.dependents(job.id), "another")
    outcome = done(claim(store)[0])
    assert store.publish([outcome]) == [outcome]
    assert store.publish([outcome]) == [outcome]
    queue._redis.zrem(keys.sequels("embed"), job.id)  # done
    assert store.publish([outcome]) == []


def test_many_texts_that_compress_to_nothing_fill_a_claim_too(queue: EmbedQueue, store: ClaimStore) -> None:
    for _ in range(5):
        queue.enqueue([""] * 1000)
    assert len(claim(store, max_bytes=8 * 1500)) == 2


def test_a_time_to_live_beyond_reason_is_clamped(queue: EmbedQueue, store: ClaimStore) -> None:
    """From another client: ours refuses it."""
    huge, odd = queue.enqueue_many(["a", "b"], retries=0)
    queue._redis.hset(keys.job(huge.id), "result_ttl", str(10**18))
    queue._redis.hset(keys.job(odd.id), "failure_ttl", "12.7")
    first, second = claim(store)
    store.publish([done(first), failed(second)])
    assert 0 < queue._redis.ttl(keys.job(huge.id)) <= 10**9
    assert 0 < queue._redis.ttl(keys.job(odd.id)) <= 12


def test_a_retry_with_an_interval_is_scheduled_as_rq_does(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text", retries=2)
    queue._redis.hset(keys.job(job.id), "retry_intervals", "[60, 0]")
    store.publish([failed(claim(store)[0], retryable=True)])
    assert job.status() is JobStatus.SCHEDULED
    assert 50 < queue._redis.zscore(keys.scheduled("embed"), job.id) - time.time() <= 61
    assert leftovers(queue) == set()
    queue._redis.hset(keys.job(job.id), mapping={"status": "queued"})
    queue._redis.rpush(keys.queue("embed"), job.id)
    store.publish([failed(claim(store)[0], retryable=True)])
    assert job.status() is JobStatus.QUEUED


def test_a_job_that_rq_cancels_while_it_runs_leaves_no_execution(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    [claimed] = claim(store)
    Job.fetch(job.id, connection=queue._client, serializer=EmbedSerializer).cancel()
    assert store.renew([claimed], 60).lost == [claimed]
    assert leftovers(queue) == set()


def test_a_worker_that_redis_has_forgotten_learns_it(queue: EmbedQueue, store: ClaimStore) -> None:
    assert not store.renew([], 60).is_known
    queue._redis.hset(keys.worker("w1"), "birth", "today")
    assert store.renew([], 60).is_known


def test_counters_of_a_live_worker_are_whole_numbers(queue: EmbedQueue, store: ClaimStore) -> None:
    queue._redis.hset(keys.worker("w1"), "birth", "today")
    queue.enqueue_many(["a", "b", "c"], retries=0)
    first, *others = claim(store)
    store.publish([failed(first), *map(done, others)])
    fields = queue._redis.hgetall(keys.worker("w1"))
    assert int(fields[b"successful_job_count"]) == 2
    assert int(fields[b"failed_job_count"]) == 1
    assert float(fields[b"total_working_time"]) == pytest.approx(1.0)
    assert fields[b"state"] == b"busy"


LARGE = b"x" * STAGE_FROM_BYTES


def test_a_large_result_goes_past_the_script_and_leaves_no_staged_stream(queue: EmbedQueue, store: ClaimStore) -> None:
    jobs = queue.enqueue_many([*"abc"], result_ttl=100)
    claims = claim(store)
    assert store.publish([Outcome.finished(claims[0], LARGE, 0.5), done(claims[1]), failed(claims[2])]) == []
    assert [queue.status(job.id) for job in jobs] == ["finished", "finished", "failed"]
    [(_, fields)] = queue._redis.xrange(keys.results(jobs[0].id))
    assert base64.b64decode(fields[b"return_value"]) == LARGE
    assert set(fields) == set(queue._redis.xrange(keys.results(jobs[1].id))[0][1])
    assert 0 < queue._redis.ttl(keys.results(jobs[0].id)) <= 100
    assert len(queue._redis.keys("rq:results:*")) == 3
    assert leftovers(queue) == set()


def test_a_large_result_of_a_job_that_is_anothers_by_now_leaves_nothing(queue: EmbedQueue, store: ClaimStore) -> None:
    kept, canceled = queue.enqueue_many([*"ab"])
    claims = claim(store)
    assert queue.cancel(canceled.id)
    for _ in range(2):  # the same call again changes nothing
        store.publish([Outcome.finished(found, LARGE, 0.5) for found in claims])
    assert (queue.status(kept.id), queue.status(canceled.id)) == ("finished", "canceled")
    assert queue._redis.xlen(keys.results(kept.id)) == 1
    assert queue._redis.xlen(keys.results(canceled.id)) == 1  # the cancellation
    assert len(queue._redis.keys("rq:results:*")) == 2


def test_a_large_result_after_an_earlier_failure_is_appended(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    store.publish([failed(claim(store)[0])])
    queue.requeue(job.id)
    store.publish([Outcome.finished(claim(store)[0], LARGE, 0.5)])
    assert [fields[b"type"] for _, fields in queue._redis.xrange(keys.results(job.id))] == [b"2", b"1"]
    assert len(queue._redis.keys("rq:results:*")) == 1


def test_a_server_that_forgot_the_scripts_gets_them_again(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    [found] = claim(store)
    queue._redis.script_flush()
    store.publish([Outcome.finished(found, LARGE, 0.5)])
    assert queue.status(job.id) == "finished"
    assert len(queue._redis.keys("rq:results:*")) == 1


@pytest.mark.parametrize("size", [10, STAGE_FROM_BYTES])
def test_whoever_waits_is_woken_by_a_result_of_any_size(queue: EmbedQueue, store: ClaimStore, size: int) -> None:
    job = queue.enqueue("text")
    woken: list[Any] = []
    waiter = threading.Thread(
        target=lambda: woken.extend(queue._redis.xread({keys.results(job.id): "0-0"}, block=20_000))
    )
    waiter.start()
    until(lambda: queue._redis.info("clients")["blocked_clients"] == 1)
    store.publish([Outcome.finished(claim(store)[0], b"x" * size, 0.5)])
    waiter.join(10)
    assert woken


def test_something_else_under_the_results_name_gives_way(queue: EmbedQueue, store: ClaimStore) -> None:
    jobs = queue.enqueue_many([*"ab"])
    for job in jobs:
        queue._redis.set(keys.results(job.id), "no stream")
    first, second = claim(store)
    store.publish([done(first), Outcome.finished(second, LARGE, 0.5)])
    assert [queue._redis.xlen(keys.results(job.id)) for job in jobs] == [1, 1]


def test_a_claimed_key_that_is_no_hash_any_more_fails_no_other(queue: EmbedQueue, store: ClaimStore) -> None:
    jobs = queue.enqueue_many([*"ab"])
    claims = claim(store)
    queue._redis.set(keys.job(jobs[0].id), "no hash")
    store.publish([done(found) for found in claims])
    assert queue.status(jobs[1].id) == "finished"
    assert leftovers(queue) == set()


def test_a_claim_says_whether_more_is_waiting(queue: EmbedQueue, store: ClaimStore) -> None:
    queue.enqueue_many(str(n) for n in range(250))
    states = [store.claim(["other", "embed"], 100, MANY).state for _ in range(4)]
    assert states == ["more", "more", "empty", "empty"]
    queue.enqueue_many([*"ab"])
    assert store.claim(["embed"], 2, MANY).state == "empty"


def test_thousands_of_jobs_of_two_queues_fit_one_call(queue: EmbedQueue, store: ClaimStore) -> None:
    with EmbedQueue(connection=queue._client, queue="other") as other:
        jobs = queue.enqueue_many(str(n) for n in range(5000)) + other.enqueue_many([*"ab"])
    claims = claim(store, "embed", "other", max_jobs=10_000)
    assert [found.job_id for found in claims] == [job.id for job in jobs]
    store.publish([done(found) for found in claims])
    assert queue._redis.zcard(keys.finished("embed")) == 5000
    assert queue._redis.zcard(keys.finished("other")) == 2
    assert leftovers(queue) == set()


def test_waiting_is_told_by_the_servers_clock(queue: EmbedQueue, store: ClaimStore) -> None:
    job = queue.enqueue("text")
    queue._redis.hset(keys.job(job.id), "enqueued_at", "2020-01-01T00:00:00.000000Z")
    [found] = claim(store)
    seconds, _ = queue._redis.time()
    assert found.queued_s == pytest.approx(seconds - 1577836800, abs=2)


def test_a_record_of_a_wrong_type_costs_no_job(queue: EmbedQueue, store: ClaimStore) -> None:
    jobs = queue.enqueue_many(["a", "b", "c"])
    queue._redis.set(keys.executions(jobs[1].id), "no sorted set")
    claims = claim(store)
    assert [found.job_id for found in claims] == [job.id for job in jobs]
    queue._redis.set(keys.executions(jobs[1].id), "again")
    store.publish([done(found) for found in claims])
    assert {queue.status(job.id) for job in jobs} == {JobStatus.FINISHED}
    assert leftovers(queue) == set()


def test_one_claim_looks_at_so_many_ids_and_no_more(queue: EmbedQueue, store: ClaimStore) -> None:
    queue._redis.rpush(keys.queue("embed"), *(f"vanished-{n}" for n in range(25_000)))
    job = queue.enqueue("text")
    states = [store.claim(["embed"], 10, MANY) for _ in range(3)]
    assert [found.state for found in states] == ["more", "more", "empty"]
    assert [found.job_id for found in states[-1].claims] == [job.id]


def test_an_id_that_is_no_text_keeps_no_other_job_from_being_claimed(queue: EmbedQueue, store: ClaimStore) -> None:
    queue._redis.hset(b"rq:job:\xff", mapping={"status": "queued", "data": "x"})
    queue._redis.rpush(keys.queue("embed"), b"\xff")
    job = queue.enqueue("text")
    claims = claim(store)
    assert claims[-1].job_id == job.id
    store.publish([done(found) for found in claims])
    assert queue.status(job.id) == "finished"


def test_a_moment_that_cannot_be_is_no_time_of_waiting(queue: EmbedQueue, store: ClaimStore) -> None:
    for number, moment in enumerate(("0001-01-01T00:00:00Z", "9999-01-01T00:00:00Z", "+", "")):
        queue.enqueue("a", job_id=f"job-{number}")
        queue._redis.hset(keys.job(f"job-{number}"), "enqueued_at", moment)
    assert [claim.queued_s for claim in store.claim(["embed"], 10, 10**9).claims] == [0.0] * 4
