"""The client against a real Redis, and with a worker that serves the stand-in model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import redis

from embedq.model import NoopEncoder, dequantize, shipped_ranges
from embedq.producer import (
    AsyncEmbedQueue,
    ConfigurationError,
    DuplicateJobError,
    Embeddings,
    EmbedJob,
    EmbedOptions,
    EmbedQueue,
    InvalidJobIdError,
    InvalidOptionError,
    InvalidTextError,
    JobCanceledError,
    JobFailedError,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    PartialEnqueueError,
    QueueAccessError,
    QueueConnectionError,
    QueueServerError,
    ResultTimeoutError,
    calls,
    keys,
    requests,
    wire,
)
from embedq.producer.connection import connect
from embedq.producer.outcomes import Watch
from embedq.producer.results import ResultReader
from embedq.worker.claims import ClaimStore
from tests.conftest import Drain, until


def vector(text: str, dim: int = 8) -> np.ndarray:
    encoder = NoopEncoder(dim)
    return encoder.postprocess(encoder.encode_tokens(encoder.tokenize([text])))[0]


def all_keys(queue: EmbedQueue) -> set[str]:
    return {key.decode() for key in queue._redis.keys("*")}


# --- enqueue and follow


def test_a_job_goes_from_queued_to_finished_and_gives_its_vectors(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue(["one", "two"], dimensions=4)
    assert job.status() is JobStatus.QUEUED
    assert queue.depth() == 1
    drain()
    assert queue.status(job.id) == "finished"
    result = job.result(timeout=5)
    assert result.vectors.shape == (2, 4)
    assert result.vectors.dtype == np.float32
    assert result.num_tokens == (3, 3)
    assert result.model == "noop:8"
    assert result.timings.total_s >= result.timings.queued_s > 0
    assert queue.depth() == 0


def test_many_jobs_keep_their_order(queue: EmbedQueue, drain: Drain) -> None:
    texts = [f"text {number}" for number in range(250)]
    jobs = queue.enqueue_many(iter(texts))
    drain()
    found = queue.results([job.id for job in jobs], timeout=5)
    for text, job in zip(texts, jobs, strict=True):
        outcome = found[job.id]
        assert not isinstance(outcome, Exception)
        np.testing.assert_allclose(outcome.vectors[0], vector(text), atol=1e-7)


def test_many_jobs_go_in_bounded_chunks(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "CHUNK_JOBS", 10)
    jobs = queue.enqueue_many([str(number) for number in range(25)])
    waiting = queue._redis.lrange(keys.queue("embed"), 0, -1)
    assert [job.id.encode() for job in jobs] == waiting


def test_round_trips_are_few(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    do, steps = queue._do, []

    def counted(step: calls.Step) -> object:
        steps.append(type(step).__name__)
        return do(step)

    monkeypatch.setattr(queue, "_do", counted)
    queue.enqueue(["a"] * 1024)
    assert steps == ["ScriptCall"]
    jobs = queue.enqueue_many(["a"] * 2500)
    assert steps == ["ScriptCall"] * 4
    queue._redis.config_resetstat()
    queue.enqueue_many(["b"] * 1000)
    stats = queue._redis.info("commandstats")
    assert {name: stats[f"cmdstat_{name}"]["calls"] for name in ("evalsha", "exists", "rpush", "sadd", "hset")} == {
        **dict.fromkeys(("evalsha", "exists", "rpush", "sadd"), 1),
        "hset": 1000,
    }
    steps.clear()
    assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.QUEUED}
    assert steps == ["Commands"]
    queue._run(calls.cancel_all(job.id for job in jobs[:200]))
    assert steps == ["Commands", "ScriptCall", "ScriptCall"]


def test_at_front_keeps_the_order_of_one_call(queue: EmbedQueue) -> None:
    last = queue.enqueue("last")
    first, second = queue.enqueue_many(["first", "second"], at_front=True)
    waiting = queue._redis.lrange(keys.queue("embed"), 0, -1)
    assert [entry.decode() for entry in waiting] == [first.id, second.id, last.id]


def test_no_user_text_stands_in_the_description_unless_asked(queue: EmbedQueue) -> None:
    job = queue.enqueue("a secret")
    assert queue._redis.hget(keys.job(job.id), "description") == b"embed 1 text, 8 characters"
    told = queue.enqueue("a secret", description="nightly run")
    assert queue._redis.hget(keys.job(told.id), "description") == b"nightly run"


def test_embed_waits_and_joins_several_jobs(queue: EmbedQueue, drain: Drain, url: str) -> None:
    texts = [f"text {number}" for number in range(150)]

    def later() -> None:
        with EmbedQueue(url) as other:
            found.append(other.embed(texts, timeout=20))

    found: list = []
    thread = threading.Thread(target=later)
    thread.start()
    while queue.depth() < 3:
        time.sleep(0.01)
    drain()
    thread.join(20)
    assert found[0].vectors.shape == (150, 8)
    np.testing.assert_allclose(found[0].vectors[149], vector(texts[149]), atol=1e-7)


def test_token_output_comes_back_text_by_text(queue: EmbedQueue, drain: Drain, url: str) -> None:
    encoder = NoopEncoder(8)
    texts = [f"text number {number}" * (number % 3) for number in range(40)]
    job = queue.enqueue(texts, output="tokens")
    drain()
    result = job.result(timeout=0)
    wanted = encoder.encode_states(encoder.tokenize(texts))
    for part, states in zip(result.tokens, wanted, strict=True):
        np.testing.assert_array_equal(part, states)
    found: list[Embeddings] = []
    with EmbedQueue(url) as other:
        thread = threading.Thread(target=lambda: found.append(other.embed(texts, output="tokens", timeout=20)))
        thread.start()
        until(lambda: queue.depth() == 3)
        drain()
        thread.join(20)
    np.testing.assert_array_equal(found[0].vectors, result.vectors)
    assert found[0].num_tokens == result.num_tokens


def test_bytes_come_back_with_their_ranges_and_long_texts_in_windows(queue: EmbedQueue, drain: Drain) -> None:
    encoder = NoopEncoder(8)
    texts = ["short", " ".join(f"w{number}" for number in range(1000))]
    as_bytes = queue.enqueue(texts, precision="int8", dimensions=6)
    chunked = queue.enqueue(texts, chunk=True, chunk_overlap=9)
    plain = queue.enqueue(texts, dimensions=6)
    drain(max_batch_tokens=400)
    result = as_bytes.result(timeout=0)
    assert (result.vectors.dtype, result.calibration) == (np.int8, "unit")
    back = dequantize(result.vectors, shipped_ranges(result.calibration, 6))
    np.testing.assert_allclose(back, plain.result(timeout=0).vectors, atol=1 / 255)
    windows = encoder.tokenize_windows(texts, overlap=9)
    means = np.stack([encoder.encode_tokens(text.windows).mean(axis=0) for text in windows])
    np.testing.assert_allclose(chunked.result(timeout=0).vectors, encoder.postprocess(means), atol=1e-6)
    assert chunked.result(timeout=0).num_tokens == (3, 1002)
    assert plain.result(timeout=0).truncated == (False, True)


def test_embed_splits_what_is_too_much_for_one_job(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_JOB_CHARS", 100)
    texts = ["x" * 60, "y" * 30, "z" * 20, *"ab"]
    assert [len(part) for part in requests.slice_texts(texts, 64)] == [2, 3]
    assert [len(part) for part in requests.slice_texts(texts, 2)] == [2, 2, 1]
    assert list(requests.slice_texts([], 64)) == []


def test_embed_that_times_out_leaves_nothing_waiting(queue: EmbedQueue) -> None:
    with pytest.raises(ResultTimeoutError, match=r"130 texts took more than 0.05 s; what still waited is canceled"):
        queue.embed([str(number) for number in range(130)], timeout=0.05)
    assert queue.depth() == 0
    assert queue._redis.zcard(keys.canceled("embed")) == 3


def test_embed_of_bad_input_enqueues_nothing(queue: EmbedQueue) -> None:
    for texts in ([], ["fine"] * 100 + [None]):
        with pytest.raises(InvalidTextError):
            queue.embed(texts)
    with pytest.raises(InvalidOptionError):
        queue.embed(["fine"], dimensions=-1)
    assert all_keys(queue) == set()


# --- ids


def test_the_same_request_under_the_same_id_is_one_job(queue: EmbedQueue, drain: Drain) -> None:
    assert queue.enqueue("text", job_id="mine") == queue.enqueue("text", job_id="mine")
    assert queue.depth() == 1
    drain()
    again = queue.enqueue("text", job_id="mine")
    assert again.status() is JobStatus.FINISHED


def test_an_id_that_is_taken_refuses_the_whole_call(queue: EmbedQueue) -> None:
    queue.enqueue("text", job_id="b")
    before = all_keys(queue)
    with pytest.raises(DuplicateJobError, match="job id b is taken") as caught:
        queue.enqueue_many(["x", "y", "z"], job_ids=["a", "b", "c"])
    assert caught.value.job_ids == ["b"]
    assert all_keys(queue) == before
    assert queue.depth() == 1


def test_job_ids_must_fit_the_texts(queue: EmbedQueue) -> None:
    with pytest.raises(InvalidJobIdError, match="as many job_ids as texts"):
        queue.enqueue_many(["x", "y"], job_ids=["a"])
    with pytest.raises(InvalidJobIdError, match="stands twice"):
        queue.enqueue_many(["x", "y"], job_ids=["a", "a"])
    with pytest.raises(InvalidJobIdError, match="letters"):
        queue.enqueue_many(["x"], job_ids=["a b"])
    with pytest.raises(InvalidTextError, match="takes a list"):
        queue.enqueue_many("xy")
    assert all_keys(queue) == set()


def test_a_bad_text_late_in_a_stream_enqueues_nothing(queue: EmbedQueue) -> None:
    def texts() -> Iterator[str]:
        yield from ("fine" for _ in range(3000))
        yield 7  # type: ignore[misc]

    with pytest.raises(InvalidTextError, match="text 3000 is int") as caught:
        queue.enqueue_many(texts())
    assert caught.value.text_index == 3000
    assert all_keys(queue) == set()


def test_an_id_that_is_taken_in_a_later_chunk_names_the_jobs_that_got_through(
    queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "CHUNK_JOBS", 2)
    queue.enqueue("other", job_id="c")
    with pytest.raises(PartialEnqueueError, match="2 of 3 jobs are enqueued; then: job id c is taken") as caught:
        queue.enqueue_many(["x", "y", "z"], job_ids=["a", "b", "c"])
    assert caught.value.job_ids == ["a", "b"]
    assert caught.value.text_indexes == [0, 1]


def test_a_connection_that_breaks_between_chunks_names_the_jobs_that_got_through(
    queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "CHUNK_JOBS", 2)
    do, steps = queue._do, []

    def breaks_later(step: calls.Step) -> object:
        steps.append(step)
        if len(steps) == 3:
            raise QueueConnectionError("gone")
        return do(step)

    monkeypatch.setattr(queue, "_do", breaks_later)
    with pytest.raises(PartialEnqueueError, match="4 of 7 jobs are enqueued; then: gone") as caught:
        queue.enqueue_many([str(number) for number in range(7)])
    assert list(queue.statuses(caught.value.job_ids).values()) == [JobStatus.QUEUED] * 4
    assert queue.depth() == 4


# --- waiting


def test_a_waiting_caller_is_woken_by_the_result(queue: EmbedQueue, drain: Drain, url: str) -> None:
    job = queue.enqueue("text")
    woken: list[float] = []

    def wait() -> None:
        with EmbedQueue(url) as other:
            other.result(job.id, timeout=20)
            woken.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    drain()
    thread.join(20)
    assert woken


def test_a_result_that_is_not_there_in_time_is_a_timeout_and_the_job_goes_on(queue: EmbedQueue) -> None:
    job = queue.enqueue("text")
    with pytest.raises(ResultTimeoutError) as caught:
        job.result(timeout=0)
    assert isinstance(caught.value, TimeoutError)
    assert job.status() is JobStatus.QUEUED


def test_results_of_many_jobs_come_with_their_errors(queue: EmbedQueue, drain: Drain) -> None:
    good = queue.enqueue("text")
    bad = queue.enqueue("text", dimensions=9)
    canceled = queue.enqueue("text")
    canceled.cancel()
    drain()
    waiting = queue.enqueue("text")
    found = queue.results([good.id, bad.id, canceled.id, waiting.id, "never"], timeout=0)
    kinds = [type(found[job_id]).__name__ for job_id in (good.id, bad.id, canceled.id, waiting.id, "never")]
    assert kinds == ["Embeddings", "JobFailedError", "JobCanceledError", "ResultTimeoutError", "JobNotFoundError"]


def test_a_key_of_another_type_fails_its_job_alone(each_url: str, drain: Drain) -> None:
    with EmbedQueue(each_url) as queue:
        ids = [job.id for job in queue.enqueue_many(["a", "b", "c"], job_ids=["good", "bad", "worse"], group="g")]
        drain(at=each_url)
        for key in (keys.results("bad"), keys.job("worse")):
            queue._redis.delete(key)
            queue._redis.set(key, "neither a stream nor a hash")
        waiting = queue.enqueue("d", job_id="waiting")
        for timeout in (0, 0.2):
            found = queue.results([*ids, waiting.id], timeout)
            assert [type(outcome) for outcome in found.values()] == [
                *(Embeddings, QueueServerError, QueueServerError, ResultTimeoutError)
            ]
            assert "WRONGTYPE" in str(found["bad"])
            assert {job.id for job, _ in queue.as_completed([*ids, waiting.id], timeout)} == set(found)
        statuses = {"good": JobStatus.FINISHED, "bad": JobStatus.FINISHED, "worse": None}
        assert queue.statuses(ids) == statuses
        assert queue.group("g").counts() == {JobStatus.FINISHED: 2}

        async def awaited() -> None:
            async with AsyncEmbedQueue(each_url) as other:
                assert await other.statuses(ids) == statuses

        asyncio.run(awaited())


def test_a_key_that_becomes_another_type_while_it_is_waited_for_fails_its_job_alone(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        reader, watch = ResultReader(queue._client), Watch()
        watch.add_fresh(job.id for job in queue.enqueue_many(["a", "b"], job_ids=["good", "bad"]))
        queue._redis.set(keys.results("bad"), "no stream")
        [(job_id, outcome)] = reader.read(watch, 0.1)
        assert (job_id, type(outcome)) == ("bad", QueueServerError)
        assert reader.read(watch, 0.1) == []
        assert watch.ids() == ["good"]


def test_of_a_stream_with_many_entries_only_the_last_is_the_result(queue: EmbedQueue, drain: Drain) -> None:
    """As a job of RQ's that is repeated leaves it."""
    job = queue.enqueue("text")
    drain()
    reason = wire.encode_exc_string(JobFailedError("later", code="later"))
    queue._redis.xadd(keys.results(job.id), {"type": 2, "exc_string": reason})
    queue._redis.hset(keys.job(job.id), "status", "failed")
    with pytest.raises(JobFailedError):
        job.result(timeout=5)


def test_what_stands_in_a_stream_is_not_fetched_whole(queue: EmbedQueue) -> None:
    job = queue.enqueue("text")
    for _ in range(50):
        queue._redis.xadd(keys.results(job.id), {"type": 4, "x": bytes(100_000)})
    before = queue._redis.info("stats")["total_net_output_bytes"]
    with pytest.raises(ResultTimeoutError):
        job.result(timeout=0.1)
    assert queue._redis.info("stats")["total_net_output_bytes"] - before < 500_000


def test_more_jobs_than_are_watched_at_once(queue: EmbedQueue, drain: Drain, url: str) -> None:
    jobs = queue.enqueue_many([str(number) for number in range(400)])
    found: dict = {}

    def wait() -> None:
        with EmbedQueue(url) as other:
            found.update(other.results([job.id for job in jobs], timeout=20))

    thread = threading.Thread(target=wait)
    thread.start()
    drain()
    thread.join(20)
    assert len(found) == 400
    assert all(len(outcome.vectors) == 1 for outcome in found.values())


def test_an_unknown_job_is_not_found_at_once(queue: EmbedQueue) -> None:
    for ask in (queue.status, queue.job, queue.result, queue.cancel, queue.requeue):
        with pytest.raises(JobNotFoundError, match="there is no job nowhere"):
            ask("nowhere")
    assert queue.statuses(["nowhere"]) == {"nowhere": None}


def test_an_expired_result_is_not_found(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text")
    drain()
    queue._redis.delete(keys.results(job.id))
    with pytest.raises(JobNotFoundError, match="has expired"):
        job.result()


def test_results_and_failures_expire_and_a_ttl_of_zero_keeps_nothing(queue: EmbedQueue, drain: Drain) -> None:
    kept = queue.enqueue("text", result_ttl=100)
    failed = queue.enqueue("text", dimensions=9, failure_ttl=50)
    forever = queue.enqueue("text", result_ttl=-1)
    gone = queue.enqueue("text", result_ttl=0)
    drain()
    ttl = queue._redis.ttl
    assert 90 < ttl(keys.job(kept.id)) <= 100
    assert 90 < ttl(keys.results(kept.id)) <= 100
    assert 40 < ttl(keys.job(failed.id)) <= 50
    assert ttl(keys.job(forever.id)) == ttl(keys.results(forever.id)) == -1
    assert queue.statuses([gone.id]) == {gone.id: None}
    assert not queue._redis.exists(keys.results(gone.id))


def test_a_waiting_job_vanishes_after_its_ttl(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text", ttl=1)
    assert queue._redis.ttl(keys.job(job.id)) == 1
    queue._redis.delete(keys.job(job.id))  # what the server does a second later
    assert drain().successful_job_count == 0
    assert queue.depth() == 0


# --- cancel and requeue


def test_cancel_before_the_start(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text")
    assert job.cancel() is True
    assert job.cancel() is False
    assert queue.depth() == 0
    assert drain().successful_job_count == 0
    with pytest.raises(JobCanceledError):
        job.result()
    assert queue._redis.ttl(keys.job(job.id)) > 0


def test_cancel_wakes_whoever_waits(queue: EmbedQueue, url: str) -> None:
    job = queue.enqueue("text")
    caught: list[BaseException] = []

    def wait() -> None:
        with EmbedQueue(url) as other:
            try:
                other.result(job.id, timeout=20)
            except JobCanceledError as err:
                caught.append(err)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    job.cancel()
    thread.join(20)
    assert caught


def test_a_finished_job_is_not_canceled(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text")
    drain()
    assert job.cancel() is False
    assert job.status() is JobStatus.FINISHED


def test_a_failed_job_can_be_requeued_and_then_finishes(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text", model="another", retries=7)
    drain()
    with pytest.raises(JobFailedError) as caught:
        job.result()
    assert caught.value.code == "wrong_model"
    assert caught.value.retryable is False
    queue._redis.hset(keys.job(job.id), "data", wire.encode_request(["text"], EmbedOptions()))
    job.requeue()
    assert job.status() is JobStatus.QUEUED
    assert queue._redis.hget(keys.job(job.id), "retries_left") == b"7"
    assert queue._redis.zcard(keys.failed("embed")) == 0
    assert queue._redis.ttl(keys.job(job.id)) == -1
    drain()
    assert len(job.result().vectors) == 1


def test_only_what_failed_or_was_canceled_is_requeued(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text")
    with pytest.raises(JobStateError, match="is queued; only a failed or canceled job"):
        job.requeue()
    job.cancel()
    other = queue.enqueue("other")
    job.requeue(at_front=True)
    assert queue._redis.lrange(keys.queue("embed"), 0, -1) == [job.id.encode(), other.id.encode()]
    drain()
    with pytest.raises(JobStateError, match="is finished"):
        job.requeue()


# --- connections


def test_a_url_that_cannot_be_is_a_configuration_error() -> None:
    for url in ("localhost:6379", "http://localhost", "", "redis://localhost:port"):
        with pytest.raises(ConfigurationError):
            EmbedQueue(url or "x")
    with pytest.raises(ConfigurationError, match="not both"):
        EmbedQueue("redis://localhost", connection=redis.Redis())
    with pytest.raises(ConfigurationError, match="decode_responses"):
        EmbedQueue(connection=redis.Redis(decode_responses=True))
    with pytest.raises(ConfigurationError, match="queue's name"):
        EmbedQueue(queue="")


def test_a_password_in_a_url_never_reaches_a_message() -> None:
    for url in (
        "redys://me:s3cret@host",
        "redis://me:s3/cret@host:1",
        "redis://h:p?password=s3cret",
        "redis://[s3cret",
    ):
        with pytest.raises(ConfigurationError) as caught:
            EmbedQueue(url)
        assert "s3" not in str(caught.value).replace("redis://[s3cret", "")
    with pytest.raises(QueueConnectionError) as refused:
        EmbedQueue("redis://me:s3cret@127.0.0.1:1").depth()
    assert "s3cret" not in str(refused.value)


def test_an_unreachable_redis_says_where_and_what_to_do() -> None:
    with EmbedQueue("redis://127.0.0.1:1/0") as nobody:
        for ask in (nobody.depth, lambda: nobody.enqueue("a"), lambda: nobody.status("a"), lambda: nobody.result("a")):
            with pytest.raises(
                QueueConnectionError, match=r"no Redis at 127\.0\.0\.1:1/0 .* is it running\?"
            ) as caught:
                ask()
            assert "\n" not in str(caught.value)
            assert caught.value.retryable


def test_a_redis_that_asks_for_a_password_says_so(queue: EmbedQueue, url: str) -> None:
    queue._redis.config_set("requirepass", "s3cret")
    try:
        with EmbedQueue(url) as stranger, pytest.raises(QueueAccessError, match="refuses these credentials") as caught:
            stranger.enqueue("text")
        assert not caught.value.retryable
        with connect(url, password="s3cret") as client, EmbedQueue(connection=client) as friend:
            assert friend.depth() == 0
    finally:
        with connect(url, password="s3cret") as admin:
            admin.config_set("requirepass", "")


def test_a_redis_out_of_memory_refuses_and_keeps_nothing_half_done(queue: EmbedQueue) -> None:
    queue.enqueue("text")  # the script is loaded
    queue._redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(QueueServerError, match="OOM"):
            queue.enqueue_many(["a", "b"])
    finally:
        queue._redis.config_set("maxmemory", "0")
    assert queue.depth() == 1


def test_a_connection_of_the_callers_own_stays_open(url: str) -> None:
    with connect(url) as client:
        with EmbedQueue(connection=client, queue="mine") as queue:
            job = queue.enqueue("text")
        assert client.llen(keys.queue("mine")) == 1
        assert repr(job) == f"EmbedJob({job.id!r})"
        assert len({job, EmbedJob(job.id, queue)}) == 1


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_redis_protocols_do(url: str, drain: Drain, protocol: int) -> None:
    with connect(url, protocol=protocol) as client, EmbedQueue(connection=client) as queue:
        done = queue.enqueue("text")
        drain()
        assert done.result().model == "noop:8"
        waiting = queue.enqueue("other")
        timer = threading.Timer(0.2, waiting.cancel)
        timer.start()
        with pytest.raises(JobCanceledError):
            waiting.result(timeout=10)
        timer.join()


def test_the_answer_is_the_same_when_redis_py_sends_a_call_again(
    each_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbedQueue(each_url, max_depth=1) as queue:
        do = queue._do

        def sends_twice(step: calls.Step) -> object:
            do(step)  # whose reply was lost
            return do(step)

        monkeypatch.setattr(queue, "_do", sends_twice)
        job = queue.enqueue("a")
        assert job.cancel() is True
        assert job.cancel() is False
        job.requeue()
        with pytest.raises(JobStateError):
            job.requeue()
        assert queue._redis.lrange(keys.queue("embed"), 0, -1) == [job.id.encode()]
        assert job.cancel() is True


def test_cancel_tells_the_worker_that_has_the_job_at_once(queue: EmbedQueue) -> None:
    mine, waiting = queue.enqueue("a"), queue.enqueue("b")
    ClaimStore(queue._client, "w", 30).claim(["embed"], 1, 10**9)
    with queue._redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(keys.cancel_channel("w"))
        channel.get_message(timeout=5)
        waiting.cancel()
        mine.cancel()
        message = channel.get_message(timeout=5)
    assert message["data"] == mine.id.encode()


def test_what_the_callers_own_iterators_raise_passes_through(queue: EmbedQueue) -> None:
    def numbers() -> Iterator[str]:
        yield "a"
        int("no number")

    with pytest.raises(ValueError, match="invalid literal"):
        queue.enqueue_many(numbers(), job_ids=["a", "b"])
    with pytest.raises(ValueError, match="invalid literal"):
        queue.enqueue_many(["a", "b"], job_ids=numbers())
    assert all_keys(queue) == set()
