"""Corners of the client: what ends late, what expires, and what does not go together."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rq.job import Job as RqJob

from embedq.model import NoopEncoder
from embedq.producer import (
    ConfigurationError,
    DuplicateJobError,
    Embeddings,
    EmbedOptions,
    EmbedQueue,
    EmbedSerializer,
    InvalidJobIdError,
    JobFailedError,
    JobStatus,
    MixedResultsError,
    ResultTimeoutError,
    WireError,
    keys,
    wire,
)
from embedq.producer.connection import connect
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.engine import Engine
from tests.conftest import Drain


def test_a_dependent_runs_however_short_the_time_to_live_of_what_it_waits_for(queue: EmbedQueue, drain: Drain) -> None:
    first = queue.enqueue("a", ttl=1000)
    second = queue.enqueue("b", depends_on=first)
    assert queue._redis.ttl(keys.dependents(first.id)) == -1
    drain()
    assert (first.status(), second.status()) == (JobStatus.FINISHED, JobStatus.FINISHED)


def test_what_has_ended_is_told_even_behind_many_that_have_not(queue: EmbedQueue, drain: Drain) -> None:
    stuck = EmbedQueue(connection=queue._client, queue="other").enqueue_many(f"text {n}" for n in range(130))
    done = queue.enqueue_many(f"text {n}" for n in range(20))
    drain()
    found = queue.results([job.id for job in (*stuck, *done)], timeout=0.5)
    assert [type(found[job.id]) for job in done] == [Embeddings] * 20
    assert {type(found[job.id]) for job in stuck} == {ResultTimeoutError}


def result(**other: Any) -> Embeddings:
    plain = Embeddings(vectors=np.zeros((1, 4), np.float32), num_tokens=(3,), truncated=(False,), model="a")
    return replace(plain, **other)


@pytest.mark.parametrize(
    "other",
    [{"model": "b"}, {"revision": "2"}, {"vectors": np.zeros((1, 5), np.float32)}, {"output": "tokens"}],
    ids=["model", "revision", "width", "output"],
)
def test_vectors_of_different_models_are_not_put_into_one_array(other: dict[str, Any]) -> None:
    with pytest.raises(MixedResultsError, match=r"embedded by a  \(sentence, 4 x float32\) and by"):
        Embeddings.concatenate([result(), result(), result(**other)])
    assert Embeddings.concatenate([result(), result()]).vectors.shape == (2, 4)


class Fleet:
    """Serves the stand-in on a thread, under a revision that may change."""

    def __init__(self, queue: EmbedQueue) -> None:
        self.revision = "1"
        self._store = ClaimStore(queue._client, "w", lease_s=30)
        self._engine = Engine(NoopEncoder(8))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Fleet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            outcomes = [self._outcome(claim) for claim in self._store.claim(["embed"], 100, 10**9).claims]
            self._store.publish(outcomes)

    def _outcome(self, claim: Claim) -> Outcome:
        made = self._engine.run(wire.decode_request(claim.data))
        return Outcome.finished(claim, wire.encode_result(replace(made, revision=self.revision)), 0.0)


def test_cached_vectors_of_other_weights_are_made_anew(queue: EmbedQueue) -> None:
    with Fleet(queue) as fleet:
        assert queue.embed(["old"], model="noop:8", cache_ttl=100).revision == "1"
        fleet.revision = "2"
        assert queue.embed(["old"], model="noop:8", cache_ttl=100).revision == "1"
        both = queue.embed(["old", "new"], model="noop:8", cache_ttl=100)
        assert (both.revision, len(both)) == ("2", 2)
        assert queue.embed(["old"], model="noop:8", cache_ttl=100).revision == "2"


class Liar(Fleet):
    """Its results are of so many texts, whatever it was asked for; with none it fails, and blames text 7."""

    def __init__(self, queue: EmbedQueue, num_texts: int, **other: Any) -> None:
        super().__init__(queue)
        self._num_texts, self._other = num_texts, other

    def _outcome(self, claim: Claim) -> Outcome:
        if not self._num_texts:
            return Outcome.failed(claim, JobFailedError("no", text_index=7))
        rows = np.zeros((self._num_texts, 4), np.float32)
        counts = {"num_tokens": (1,) * self._num_texts, "truncated": (False,) * self._num_texts}
        return Outcome.finished(claim, wire.encode_result(result(vectors=rows, **counts, **self._other)), 0.0)


@pytest.mark.parametrize("cache", [{}, {"cache_ttl": 100}], ids=["plain", "cache"])
@pytest.mark.parametrize(("num_texts", "other"), [(1, {}), (5, {}), (3, {"output": "tokens"})])
def test_a_result_of_another_number_of_texts_is_none(
    queue: EmbedQueue, num_texts: int, other: dict[str, Any], cache: dict[str, int]
) -> None:
    with Liar(queue, num_texts, **other):
        with pytest.raises(WireError, match=f"is of {num_texts} texts"):
            queue.embed(["a", "b", "c"], model="a", timeout=10, **cache)
        with pytest.raises(WireError, match=f"is of {num_texts} texts"):
            list(queue.embed_stream(["a", "b", "c"], model="a", timeout=10, **cache))  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", [{}, {"cache_ttl": 100}], ids=["plain", "cache"])
def test_a_failure_that_blames_a_text_which_is_not_there_blames_none(queue: EmbedQueue, cache: dict[str, int]) -> None:
    with Liar(queue, 0):
        with pytest.raises(JobFailedError) as caught:
            queue.embed(["a", "b", "c"], model="a", timeout=10, **cache)
        assert caught.value.text_index is None
        items = list(queue.embed_stream(["a", "b", "c"], model="a", timeout=10, on_error="yield", **cache))  # type: ignore[arg-type]
        assert [item.error.text_index for item in items if isinstance(item.error, JobFailedError)] == [None] * 3


@pytest.mark.parametrize("other", [{"model": "x/other"}, {"output": "tokens", "num_tokens": (1,)}])
def test_a_cached_vector_of_another_model_or_kind_is_none(queue: EmbedQueue, other: dict[str, Any]) -> None:
    with Fleet(queue):
        made = queue.embed(["a"], model="noop:8", cache_ttl=100, timeout=10)
        [place] = queue._redis.keys(keys.vector("*"))
        queue._redis.set(place, wire.encode_result(replace(made, **other, revision="planted")))
        again = queue.embed(["a"], model="noop:8", cache_ttl=100, timeout=10)
    assert (again.model, again.output, again.revision) == ("noop:8", "sentence", "1")


def test_a_string_is_no_list_of_ids(queue: EmbedQueue) -> None:
    job = queue.enqueue("text")
    assert list(queue.results(job.id, timeout=0)) == [job.id]
    assert list(queue.statuses(job.id)) == [job.id]
    with pytest.raises(InvalidJobIdError):
        queue.results(7, timeout=0)  # type: ignore[arg-type]


def test_no_piece_of_a_password_is_in_a_traceback() -> None:
    with pytest.raises(ConfigurationError) as caught:
        connect("redis://:se#cret@host")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_result_that_dedupe_finds_is_there_for_a_while_yet(queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("text", dedupe=True, result_ttl=5)
    drain()
    assert queue.enqueue("text", dedupe=True) == job
    assert queue._redis.ttl(keys.job(job.id)) > 50
    assert queue._redis.ttl(keys.results(job.id)) > 50


def test_a_job_that_starts_afresh_forgets_what_the_earlier_call_asked_for(queue: EmbedQueue) -> None:
    job = queue.enqueue("text", dedupe=True, ttl=500, group="old", retry_intervals=[1], on_success="a.b")
    job.cancel()
    assert queue.enqueue("text", dedupe=True) == job
    fields = queue._redis.hgetall(keys.job(job.id))
    assert not {b"ttl", b"group_id", b"retry_intervals", b"success_callback_name"} & set(fields)
    assert job.status() is JobStatus.QUEUED


def test_canceling_one_job_hides_no_other_from_the_registry(queue: EmbedQueue) -> None:
    first, second = queue.enqueue("a"), queue.enqueue("b", failure_ttl=1)
    queue._redis.sadd(keys.dependents(first.id), "another")
    first.cancel()
    queue._redis.zincrby(keys.canceled("embed"), -100, first.id)  # a while ago
    second.cancel()
    assert queue._redis.zscore(keys.canceled("embed"), first.id) is not None
    assert queue._redis.ttl(keys.dependents(first.id)) > 0


@pytest.mark.parametrize("text", ["short", "a longer one " * 50])
def test_a_request_is_the_same_however_its_bytes_were_compressed(each_url: str, text: str) -> None:
    with EmbedQueue(each_url) as queue:
        job = queue.enqueue(text, job_id="ours")
        # As RQ does with every job that it writes anew, a dependent's among them.
        RqJob.fetch("ours", queue._redis, serializer=EmbedSerializer).save()
        assert queue._redis.hget(keys.job("ours"), "data") != wire.encode_request([text], EmbedOptions())
        assert queue.enqueue(text, job_id="ours") == job
        assert queue.enqueue_many(["new", text], job_ids=["new", "ours"])[1] == job
        assert queue.depth() == 2
        with pytest.raises(DuplicateJobError, match="ours is taken"):
            queue.enqueue_many(["newer", "another"], job_ids=["newer", "ours"])
        assert queue.depth() == 2


@pytest.mark.parametrize("data", [b"x\x01not zlib at all", None])
def test_an_id_whose_data_cannot_be_read_is_taken(queue: EmbedQueue, data: bytes | None) -> None:
    queue._redis.hset(keys.job("ours"), mapping={"status": "queued", **({"data": data} if data else {})})
    with pytest.raises(DuplicateJobError, match="ours is taken"):
        queue.enqueue("a", job_id="ours")


def test_canceling_a_job_that_waits_for_others_leaves_nothing_for_good(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        first = queue.enqueue("a")
        job = queue.enqueue("b", depends_on=first, failure_ttl=100)
        job.cancel()
        assert 0 < queue._redis.ttl(keys.dependencies(job.id)) <= 100
        job.requeue()
        assert queue._redis.ttl(keys.dependencies(job.id)) == -1


def test_a_job_that_starts_afresh_waits_for_what_it_now_depends_on_alone(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        first, second = queue.enqueue_many(["a", "b"], job_ids=["first", "second"])
        job = queue.enqueue("c", dedupe=True, depends_on=first)
        job.cancel()
        queue.enqueue("c", dedupe=True, depends_on=second)
        assert queue._redis.smembers(keys.dependencies(job.id)) == {b"second"}
        assert queue._redis.ttl(keys.dependencies(job.id)) == -1
