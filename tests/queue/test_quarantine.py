"""Jobs that were tried before: kept apart, alone at last, and named when a worker dies of them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import redis
from rq.registry import StartedJobRegistry

from embedq.model import NoopEncoder
from embedq.producer import EmbedQueue, EmbedSerializer, JobFailedError, JobStatus, keys
from embedq.producer.connection import is_passing
from embedq.producer.jobs import EmbedJob
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.watchdog import Watchdog
from tests.conftest import Drain, until

#: `embedq` with a device that a text can end: `die` the process, `hang` it for good, `lose` the device, `panic`.
POISONOUS = """
import hashlib, os, time
from embedq.model import DeviceLostError, NoopEncoder
from embedq.worker.cli import main
class Panic(BaseException):
    "As pyo3's, of a library in Rust."
tokenize, encode = NoopEncoder.tokenize, NoopEncoder.encode_tokens
poison = {}
def look(self, texts, **options):
    if "die early" in texts:
        os._exit(77)
    if "hang early" in texts:
        time.sleep(1000)
    if "panic" in texts:
        raise Panic("called `Result::unwrap()` on an `Err` value")
    tokens = tokenize(self, texts, **options)
    poison.update((id(token), (token, text)) for text, token in zip(texts, tokens))
    return tokens
def suffer(self, batch):
    for token in batch:
        text = poison[id(token)][1]
        if text == "die":
            os._exit(77)
        if text == "hang":
            time.sleep(1000)
        if text == "hang in C":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        if text == "lose":
            raise DeviceLostError("CUDA error: device-side assert triggered")
    return encode(self, batch)
NoopEncoder.tokenize, NoopEncoder.encode_tokens = look, suffer
main()
"""


def reference(*texts: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    encoder = NoopEncoder(8)
    return encoder.postprocess(encoder.encode_tokens(encoder.tokenize(texts)))


class Fleet:
    """One worker at a time, a new one for each that has died."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self.statuses: list[int] = []
        script = folder / "poisonous.py"
        script.write_text(POISONOUS)
        self._program = [sys.executable, str(script)]

    def drain(self, queue: EmbedQueue, jobs: Sequence[EmbedJob], *arguments: str, timeout_s: float = 60) -> None:
        """Until every job has ended."""
        deadline = time.monotonic() + timeout_s
        options = ("--url", self._url, "--model", "noop:8", "--lease-s", "1", *arguments)
        process: subprocess.Popen[bytes] | None = None
        try:
            while not all(status in ENDED for status in queue.statuses([job.id for job in jobs]).values()):
                assert time.monotonic() < deadline, self.log()
                if process is None or process.poll() is not None:
                    self.statuses += [] if process is None else [process.returncode]
                    with (self._folder / "worker.log").open("ab") as log:
                        process = subprocess.Popen([*self._program, "worker", *options], stdout=log, stderr=log)
                time.sleep(0.05)
        finally:
            if process is not None:
                process.kill()
                process.wait(20)

    @contextlib.contextmanager
    def one(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker with a long lease."""
        options = ("--url", self._url, "--model", "noop:8", *arguments)
        with (self._folder / "worker.log").open("ab") as log:
            process = subprocess.Popen([*self._program, "worker", *options], stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait(20)

    def log(self) -> str:
        return (self._folder / "worker.log").read_text()


ENDED = {JobStatus.FINISHED, JobStatus.FAILED}


@pytest.fixture
def fleet(url: str, short_path: Path) -> Fleet:
    return Fleet(url, short_path)


@pytest.fixture
def each_queue(each_url: str) -> Iterator[EmbedQueue]:
    with EmbedQueue(each_url) as client:
        yield client


@pytest.fixture
def claim_again(each_queue: EmbedQueue) -> Callable[[], Claim]:
    """Claims the one job that waits, for a worker that then dies."""

    def claim() -> Claim:
        [claimed] = ClaimStore(each_queue._client, "w1", 30).claim(["embed"], 10, 10**6).claims
        return claimed

    return claim


def run_out(queue: EmbedQueue) -> None:
    """The worker has died: its lease ends, another takes the job back."""
    for pair in queue._redis.zrange(keys.started("embed"), 0, -1):
        queue._redis.zadd(keys.started("embed"), {pair: 0})
    ClaimStore(queue._client, "w2", 30).recover("embed")


def failure(job: EmbedJob) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        job.result(timeout=0)
    return caught.value


# --- what Redis knows of attempts


def test_a_claim_tells_how_often_a_job_was_tried(each_queue: EmbedQueue, claim_again: Callable[[], Claim]) -> None:
    each_queue.enqueue("text", retries=2)
    seen = []
    for _ in range(3):
        claimed = claim_again()
        seen.append((claimed.attempts, claimed.is_last))
        ClaimStore(each_queue._client, "w1", 30).begin([(claimed, JobFailedError.abandoned())])
        run_out(each_queue)
    assert seen == [(0, False), (1, False), (2, True)]


def test_an_attempt_that_rqs_own_clean_up_ended_counts_too(
    each_queue: EmbedQueue, claim_again: Callable[[], Claim]
) -> None:
    each_queue.enqueue("text", retries=2)
    abandoned = claim_again()
    each_queue._redis.zadd(keys.started("embed"), {f"{abandoned.job_id}:{abandoned.execution_id}": 1})
    StartedJobRegistry("embed", connection=each_queue._client, serializer=EmbedSerializer).cleanup()
    claimed = claim_again()
    assert (claimed.attempts, claimed.is_last) == (1, False)


def test_a_death_costs_a_retried_job_no_attempt_that_had_not_begun(
    each_queue: EmbedQueue, claim_again: Callable[[], Claim]
) -> None:
    job = each_queue.enqueue("text", retries=1)
    claim_again()
    run_out(each_queue)
    for _ in range(5):
        assert claim_again().is_last
        run_out(each_queue)
    assert job.status() is JobStatus.QUEUED
    store = ClaimStore(each_queue._client, "w1", 30)
    assert store.begin([(claim_again(), JobFailedError.abandoned(3))]) == []
    run_out(each_queue)
    assert job.status() is JobStatus.FAILED
    assert (failure(job).code, failure(job).text_index) == ("abandoned", 3)
    assert each_queue._redis.zcard(keys.failed("embed")) == 1
    assert not each_queue._redis.keys("*execution*")


def test_what_is_begun_and_given_back_has_not_begun(each_queue: EmbedQueue, claim_again: Callable[[], Claim]) -> None:
    job = each_queue.enqueue("text", retries=1)
    claim_again()
    run_out(each_queue)
    store = ClaimStore(each_queue._client, "w1", 30)
    claimed = claim_again()
    store.begin([(claimed, JobFailedError.abandoned())])
    store.release([claimed])
    claim_again()
    run_out(each_queue)
    assert job.status() is JobStatus.QUEUED


def test_who_has_lost_its_lease_begins_nothing(each_queue: EmbedQueue, claim_again: Callable[[], Claim]) -> None:
    each_queue.enqueue("text", retries=3)
    late = claim_again()
    run_out(each_queue)
    assert ClaimStore(each_queue._client, "w1", 30).begin([(late, JobFailedError.abandoned())]) == [late]
    assert not each_queue._redis.keys("*execution*")


def test_a_claim_told_again_tells_the_attempts_too(each_queue: EmbedQueue, claim_again: Callable[[], Claim]) -> None:
    each_queue.enqueue("text", retries=3)
    claim_again()
    run_out(each_queue)
    store = ClaimStore(each_queue._client, "w1", 30)
    nonce = store._nonce
    [first] = store.claim(["embed"], 10, 10**6).claims
    store._nonce = nonce  # as redis-py sends it again after a lost reply
    [again] = store.claim(["embed"], 10, 10**6).claims
    assert (again.execution_id, again.attempts, again.is_last) == (first.execution_id, 1, False)


def test_a_claim_ends_what_a_cancellation_could_not(each_queue: EmbedQueue) -> None:
    """By a client without a right to the records of executions."""
    job = each_queue.enqueue("text", retries=0)
    first, second = (ClaimStore(each_queue._client, name, 30) for name in ("w1", "w2"))
    [late] = first.claim(["embed"], 10, 10**6).claims
    each_queue._redis.hset(keys.job(job.id), "status", "queued")
    each_queue._redis.rpush(keys.queue("embed"), job.id)
    [claimed] = second.claim(["embed"], 10, 10**6).claims
    assert each_queue._redis.zrange(keys.started("embed"), 0, -1) == [f"{job.id}:{claimed.execution_id}".encode()]
    assert each_queue._redis.smembers(keys.worker_executions("w1")) == set()
    assert first.renew([late], 60).lost == [late]
    assert first.publish([Outcome.finished(late, b"late", 0.1)]) == []
    assert job.status() is JobStatus.STARTED


def test_a_full_server_takes_no_beginning(each_queue: EmbedQueue, claim_again: Callable[[], Claim]) -> None:
    each_queue.enqueue("text", retries=2)
    claim_again()
    run_out(each_queue)
    claimed = claim_again()
    store = ClaimStore(each_queue._client, "w1", 30)
    each_queue._redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.RedisError) as refused:
            store.begin([(claimed, JobFailedError.abandoned())])
    finally:
        each_queue._redis.config_set("maxmemory", 0)
    assert is_passing(refused.value)


def test_a_job_enqueued_afresh_or_repeated_was_never_tried(
    each_queue: EmbedQueue, claim_again: Callable[[], Claim]
) -> None:
    job = each_queue.enqueue("text", dedupe=True, retries=1)
    claim_again()
    run_out(each_queue)
    store = ClaimStore(each_queue._client, "w1", 30)
    again = claim_again()
    store.publish([Outcome.failed(again, JobFailedError("no"))])
    assert each_queue.enqueue("text", dedupe=True, retries=1).id == job.id
    assert claim_again().attempts == 0


# --- how a worker does them


def test_retried_jobs_share_no_micro_batch_with_first_attempts_and_the_last_attempt_is_alone(
    queue: EmbedQueue, drain: Drain
) -> None:
    fresh = queue.enqueue_many([f"fresh {n}" for n in range(5)])
    retried = queue.enqueue_many([f"retried {n}" for n in range(4)])
    last = queue.enqueue_many([f"last {n}" for n in range(3)])
    for job in retried:
        queue._redis.hset(keys.job(job.id), "embedq_attempts", 1)
    for job in last:
        queue._redis.hset(keys.job(job.id), mapping={"embedq_attempts": 3, "retries_left": 0})
    assert drain().successful_job_count == 12
    shared = {name: {job.result().timings.batch_texts for job in jobs} for name, jobs in
              (("fresh", fresh), ("retried", retried), ("last", last))}  # fmt: skip
    assert shared == {"fresh": {5}, "retried": {4}, "last": {1}}
    assert not queue._redis.keys("*execution*")


def test_a_last_attempt_of_many_texts_gives_what_a_first_one_does(queue: EmbedQueue, drain: Drain) -> None:
    texts = [f"text {n} " * n for n in range(1, 8)]
    job, chunked = queue.enqueue(texts), queue.enqueue(["word " * 900, "short"], chunk=True)
    twin = queue.enqueue(["word " * 900, "short"], chunk=True)
    for each in (job, chunked):
        queue._redis.hset(keys.job(each.id), mapping={"embedq_attempts": 3, "retries_left": 0})
    drain()
    assert np.array_equal(job.result().vectors, reference(*texts))
    assert job.result().timings.batch_texts == 1
    assert np.array_equal(chunked.result().vectors, twin.result().vectors)


def test_a_last_attempt_that_cannot_be_read_fails(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text")
    queue._redis.hset(keys.job(job.id), mapping={"embedq_attempts": 3, "retries_left": 0, "data": b"[nonsense"})
    drain()
    assert failure(job).code == "bad_payload"


def test_an_innocent_job_survives_a_text_that_kills_its_worker_each_time(queue: EmbedQueue, fleet: Fleet) -> None:
    innocent = queue.enqueue_many([f"innocent {n}" for n in range(40)], retries=2)
    poison = queue.enqueue(["fine", "die", "fine too"], retries=2)
    beside = queue.enqueue_many([f"beside {n}" for n in range(40)], retries=2)
    fleet.drain(queue, [*innocent, poison, *beside])
    assert [job.status() for job in (*innocent, *beside)] == [JobStatus.FINISHED] * 80
    assert np.array_equal(beside[7].result().vectors, reference("beside 7"))
    assert (failure(poison).code, failure(poison).text_index) == ("abandoned", 1)
    assert fleet.statuses.count(77) == 3
    assert not queue._redis.keys("*execution*")


def test_a_text_that_kills_the_tokenizer_is_named_too(queue: EmbedQueue, fleet: Fleet) -> None:
    innocent = queue.enqueue_many([f"innocent {n}" for n in range(5)], retries=1)
    poison = queue.enqueue(["fine", "fine too", "die early"], retries=1)
    fleet.drain(queue, [*innocent, poison])
    assert {job.status() for job in innocent} == {JobStatus.FINISHED}
    assert (failure(poison).code, failure(poison).text_index) == ("abandoned", 2)


def test_a_text_at_which_the_tokenizer_hangs_is_named_too(queue: EmbedQueue, fleet: Fleet) -> None:
    poison = queue.enqueue(["fine", "hang early"], retries=1)
    fleet.drain(queue, [poison], "--encode-timeout-s", "1")
    assert (failure(poison).code, failure(poison).text_index) == ("hung", 1)


def test_a_tokenizer_that_panics_fails_its_job_and_ends_nothing(queue: EmbedQueue, fleet: Fleet) -> None:
    poison, good = queue.enqueue("panic", retries=0), queue.enqueue("good")
    fleet.drain(queue, [poison, good])
    assert good.status() is JobStatus.FINISHED
    assert failure(poison).code == "internal"
    assert fleet.statuses == []


@pytest.mark.parametrize("step", ["engine.Engine.tokenize_all", "budget.MemoryBudget.succeeded"])
def test_whatever_ends_a_stage_costs_the_jobs_at_work_an_attempt(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def crash(*_: object) -> None:
        raise AssertionError("a mistake of ours")

    job = queue.enqueue("text", retries=1)
    monkeypatch.setattr(f"embedq.worker.{step}", crash)
    for retries_left in (b"0", b"0"):
        assert job.status() is JobStatus.QUEUED
        with pytest.raises(AssertionError):
            drain()
        assert queue._redis.hget(keys.job(job.id), "retries_left") == retries_left
    assert failure(job).code == "internal"


def test_a_worker_that_leaves_a_hanging_batch_claims_nothing_more(queue: EmbedQueue, fleet: Fleet) -> None:
    jobs = [queue.enqueue("hang", retries=3), *queue.enqueue_many([f"innocent {n}" for n in range(3)], retries=0)]
    with fleet.one("--encode-timeout-s", "1", "--max-claim-jobs", "1", "--prefetch-batches", "4") as worker:
        assert worker.wait(30) == 8
    assert queue._redis.zcard(keys.started("embed")) == 0
    assert {job.status() for job in jobs[1:]} <= {JobStatus.QUEUED, JobStatus.FINISHED}
    assert jobs[0].status() is JobStatus.QUEUED


@pytest.mark.parametrize("attempts", [0, 1, 9])
def test_a_signal_ends_a_worker_whose_library_does_not_come_back(
    queue: EmbedQueue, fleet: Fleet, attempts: int
) -> None:
    job = queue.enqueue("hang in C", retries=0 if attempts == 9 else 3)
    if attempts:
        queue._redis.hset(keys.job(job.id), "embedq_attempts", attempts)
    with fleet.one("--grace-s", "1") as worker:
        until(lambda: job.status() is JobStatus.STARTED)
        time.sleep(0.5)
        worker.terminate()
        assert worker.wait(10) == 3
    assert job.status() is JobStatus.QUEUED


def test_a_micro_batch_that_hangs_ends_the_worker_and_at_last_its_job(queue: EmbedQueue, fleet: Fleet) -> None:
    innocent = queue.enqueue_many([f"innocent {n}" for n in range(5)], retries=1)
    poison = queue.enqueue(["fine", "hang"], retries=1)
    fleet.drain(queue, [*innocent, poison], "--encode-timeout-s", "1")
    assert {job.status() for job in innocent} == {JobStatus.FINISHED}
    assert (failure(poison).code, failure(poison).text_index) == ("hung", 1)
    assert fleet.statuses[0] == 8
    assert fleet.log().count("has not ended within 1 s") == 2


def test_a_lost_device_ends_the_worker_with_a_status_of_its_own(queue: EmbedQueue, fleet: Fleet) -> None:
    innocent = queue.enqueue_many([f"innocent {n}" for n in range(5)], retries=1)
    poison = queue.enqueue(["fine", "lose"], retries=1)
    fleet.drain(queue, [*innocent, poison])
    assert {job.status() for job in innocent} == {JobStatus.FINISHED}
    assert (failure(poison).code, failure(poison).text_index) == ("device_lost", 1)
    assert fleet.statuses[0] == 7
    assert "error: CUDA error: device-side assert triggered" in fleet.log()


# --- the watchdog


def test_the_watchdog_tells_what_takes_too_long_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now, hung = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(5.0, hung.append)
    for _ in range(20):  # many short ones
        with watchdog.watching("short"):
            now[0] += 1.0
            watchdog.tick()
    assert hung == []
    with watchdog.watching("long"):
        for _ in range(5):
            now[0] += 1.0
            watchdog.tick()
        assert hung == []
        now[0] += 1.0
        watchdog.tick()
    assert hung == ["long"]


def test_what_begins_just_before_a_tick_is_not_charged_with_the_time_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, hung = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(1.0, hung.append)
    for _ in range(5):
        now[0] += 1.9
        with watchdog.watching("short"):
            now[0] += 0.1
            watchdog.tick()
    assert hung == []


def test_a_process_that_stood_still_is_not_taken_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, hung = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(5.0, hung.append)
    with watchdog.watching("batch"):
        now[0] += 3600.0  # stopped for an hour
        watchdog.tick()
    assert hung == []
