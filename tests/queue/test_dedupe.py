"""`dedupe`: the same request is the same job, by the hash of its content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.producer import EmbedOptions, EmbedQueue, InvalidJobIdError, JobFailedError, JobStatus, keys, requests, wire
from embedq.worker.claims import ClaimStore
from tests.conftest import Drain


def test_the_same_request_is_one_job_waiting_running_or_finished(each_url: str, drain: Drain) -> None:
    with EmbedQueue(each_url) as queue:
        waiting = queue.enqueue(["a", "b"], dedupe=True, dimensions=4)
        assert queue.enqueue(["a", "b"], dimensions=4, dedupe=True) == waiting
        assert queue.depth() == 1
        ClaimStore(queue._client, "w", 30).claim(["embed"], 10, 10**9)
        assert queue.enqueue(["a", "b"], dedupe=True, dimensions=4).status() is JobStatus.STARTED
        queue.cancel(waiting.id)
        queue.requeue(waiting.id)
        drain(at=each_url)
        assert queue.enqueue(["a", "b"], dedupe=True, dimensions=4, retries=9).result(timeout=0).vectors.shape == (2, 4)
        assert queue.depth() == 0


def test_any_difference_makes_another_job(queue: EmbedQueue, url: str) -> None:
    jobs = [
        queue.enqueue("a", dedupe=True),
        queue.enqueue("b", dedupe=True),
        queue.enqueue(["a", "b"], dedupe=True),
        queue.enqueue("a", dedupe=True, model="noop:8"),
        queue.enqueue("a", dedupe=True, precision="int8"),
        queue.enqueue("a"),
    ]
    with EmbedQueue(url, queue="other") as other:  # whose workers may serve another model
        jobs.append(other.enqueue("a", dedupe=True))
    assert len({job.id for job in jobs}) == len(jobs)
    assert queue.depth() == len(jobs) - 1


def test_settings_are_no_part_of_the_request(queue: EmbedQueue) -> None:
    job = queue.enqueue("a", dedupe=True)
    assert queue.enqueue("a", dedupe=True, retries=0, at_front=True, description="x", result_ttl=5) == job
    assert queue.enqueue("a", dedupe=True, truncate=True, normalize=None) == job


def test_a_job_that_failed_or_was_canceled_starts_afresh(each_url: str, drain: Drain) -> None:
    with EmbedQueue(each_url) as queue:
        job = queue.enqueue("a", dedupe=True, dimensions=99, retries=2)
        drain(at=each_url)
        with pytest.raises(JobFailedError):
            job.result(timeout=0)
        queue._redis.hset(keys.job(job.id), "retries_left", 0)
        assert queue.enqueue("a", dedupe=True, dimensions=99, retries=2) == job
        assert job.status() is JobStatus.QUEUED
        assert queue._redis.hget(keys.job(job.id), "retries_left") == b"2"
        assert queue._redis.zcard(keys.failed("embed")) == 0
        assert queue._redis.ttl(keys.job(job.id)) == -1
        job.cancel()
        assert queue.enqueue("a", dedupe=True, dimensions=99, ttl=50) == job
        assert queue._redis.zcard(keys.canceled("embed")) == 0
        assert 0 < queue._redis.ttl(keys.job(job.id)) <= 50
        drain(model="noop:128", at=each_url)
        assert job.result(timeout=0).vectors.shape == (1, 99)


def test_a_text_that_stands_twice_in_one_call_is_one_job(queue: EmbedQueue, drain: Drain) -> None:
    jobs = queue.enqueue_many(["a", "b", "a", "c", "b"], dedupe=True)
    assert [jobs.index(job) for job in jobs] == [0, 1, 0, 3, 1]
    assert queue.depth() == 3
    drain()
    assert len(queue.results(job.id for job in jobs)) == 3


def test_embed_joins_what_stands_twice(queue: EmbedQueue, drain: Drain) -> None:
    texts = [str(number) for number in range(64)] * 2
    queue.enqueue(texts[:64], dedupe=True)
    drain()
    vectors = queue.embed(texts, dedupe=True, timeout=0).vectors
    assert vectors.shape == (128, 8)
    assert vectors[:64].tolist() == vectors[64:].tolist()


def test_an_id_and_dedupe_exclude_each_other(queue: EmbedQueue) -> None:
    with pytest.raises(InvalidJobIdError, match="exclude each other"):
        queue.enqueue("a", job_id="mine", dedupe=True)
    with pytest.raises(InvalidJobIdError, match="exclude each other"):
        queue.enqueue_many(["a"], job_ids=["mine"], dedupe=True)
    assert queue.depth() == 0


options = st.fixed_dictionaries(
    {},
    optional={
        "dimensions": st.none() | st.integers(1, 9),
        "precision": st.sampled_from(["float32", "int8"]),
        "normalize": st.none() | st.booleans(),
        "prompt": st.none() | st.text(max_size=3).filter(str.isascii),
        "model": st.none() | st.sampled_from(["a", "b"]),
        "truncate": st.booleans(),
    },
)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1), options, st.randoms())
def test_the_hash_goes_by_content_not_by_order(texts: list[str], given_options: dict, random: object) -> None:
    names = list(given_options)
    random.shuffle(names)  # type: ignore[attr-defined]
    shuffled = {name: given_options[name] for name in names}

    def content_id(mapping: dict) -> str:
        return requests.content_id("embed", wire.plain_request(texts, EmbedOptions.from_mapping(mapping)))

    assert content_id(given_options) == content_id(shuffled)
    plain = wire.plain_request(texts, EmbedOptions.from_mapping(given_options))
    assert wire.decode_request(plain) == wire.EmbedRequest(texts, EmbedOptions.from_mapping(given_options))
