"""One queue over three Redis servers: the surface of `EmbedQueue`, and shards that come, go and die."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from embedq.model import NoopEncoder
from embedq.producer import (
    AsyncShardedEmbedQueue,
    DuplicateJobError,
    Embeddings,
    EmbedQueue,
    InvalidOptionError,
    JobCanceledError,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    PartialEnqueueError,
    QueueConnectionError,
    QueueFull,
    ResultTimeoutError,
    ShardedEmbedQueue,
    keys,
)
from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.conftest import Drain, redis_binaries, until

NAMES = ("one", "two", "three")


def vector(text: str) -> np.ndarray:
    encoder = NoopEncoder(8)
    return encoder.postprocess(encoder.encode_tokens(encoder.tokenize([text])))[0]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, RedisServer]]:
    if not redis_binaries():
        pytest.skip("no redis-server is installed")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(RedisServer(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eq-")))))
            for name in NAMES
        }


@pytest.fixture
def urls(servers: dict[str, RedisServer]) -> dict[str, str]:
    """Three empty servers by name; one that a test has ended is started again."""
    for server in servers.values():
        try:
            with connect(server.url) as client:
                client.flushall()
        except Exception:
            server.stop()
            server.start()
    return {name: server.url for name, server in servers.items()}


@pytest.fixture
def queue(urls: dict[str, str]) -> Iterator[ShardedEmbedQueue]:
    with ShardedEmbedQueue(urls) as client:
        yield client


@pytest.fixture
def drain_all(urls: dict[str, str], drain: Drain) -> Drain:
    """A worker a shard, one after the other."""

    def run(*shards: str, **settings: object) -> None:
        for name in shards or NAMES:
            drain(at=urls[name], **settings)

    return run  # type: ignore[return-value]


def home(queue: ShardedEmbedQueue | AsyncShardedEmbedQueue, job_id: str) -> str:
    return queue._place._shards.home(job_id)


def ids_on(queue: ShardedEmbedQueue, shard: str, number: int) -> list[str]:
    return [queue._place.id_on(shard) for _ in range(number)]


def waiting_on(url: str) -> set[str]:
    with connect(url) as client:
        return {job_id.decode() for job_id in client.lrange(keys.queue("embed"), 0, -1)}


# --- the surface


def test_jobs_are_where_their_ids_say_and_give_their_vectors_in_order(
    queue: ShardedEmbedQueue, urls: dict[str, str], drain_all: Drain
) -> None:
    texts = [f"text {number}" for number in range(60)]
    jobs = queue.enqueue_many(texts)
    for name, url in urls.items():
        assert waiting_on(url) == {job.id for job in jobs if home(queue, job.id) == name} != set()
    assert queue.depth() == 60
    drain_all()
    found = queue.results([job.id for job in jobs])
    assert list(found) == [job.id for job in jobs]
    for text, outcome in zip(texts, found.values(), strict=True):
        assert isinstance(outcome, Embeddings)
        assert np.array_equal(outcome.vectors[0], vector(text))
    assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.FINISHED}


def test_one_job_is_followed_canceled_and_requeued_by_its_id(queue: ShardedEmbedQueue, drain_all: Drain) -> None:
    job = queue.enqueue("a text", job_id="mine")
    assert queue.enqueue("a text", job_id="mine") == job
    with pytest.raises(DuplicateJobError):
        queue.enqueue("another text", job_id="mine")
    assert queue.job("mine").status() is JobStatus.QUEUED
    assert job.cancel() is True
    with pytest.raises(JobCanceledError):
        job.result(timeout=5)
    job.requeue()
    with pytest.raises(JobStateError):
        job.requeue()
    drain_all()
    assert len(job.result(timeout=5)) == 1
    assert job.cancel() is False


def test_an_id_that_no_shard_knows_is_told_as_on_one_server(queue: ShardedEmbedQueue) -> None:
    for ask in (queue.job, queue.status, queue.cancel, queue.requeue, lambda job_id: queue.result(job_id, timeout=0)):
        with pytest.raises(JobNotFoundError, match="there is no job unheard-of"):
            ask("unheard-of")
    assert queue.statuses(["unheard-of"]) == {"unheard-of": None}


def test_the_same_request_under_dedupe_is_one_job_on_one_shard(queue: ShardedEmbedQueue) -> None:
    first, second = queue.enqueue("a text", dedupe=True), queue.enqueue("a text", dedupe=True)
    assert first == second
    assert queue.depth() == 1
    jobs = queue.enqueue_many(["x", "y", "x", "a text"], dedupe=True)
    assert jobs[0] == jobs[2]
    assert jobs[3] == first
    assert queue.depth() == 3


def test_a_group_is_what_all_shards_have_of_it(queue: ShardedEmbedQueue, drain_all: Drain) -> None:
    jobs = queue.enqueue_many(map(str, range(30)), group="nightly")
    group = queue.group("nightly")
    assert sorted(group.job_ids()) == sorted(job.id for job in jobs)
    drain_all("one")
    done = sum(home(queue, job.id) == "one" for job in jobs)
    assert group.counts() == {JobStatus.FINISHED: done, JobStatus.QUEUED: 30 - done}
    assert group.cancel() == 30 - done
    assert Counter(type(outcome) for outcome in group.results(timeout=5).values()) == {
        Embeddings: done,
        JobCanceledError: 30 - done,
    }


def test_jobs_put_off_wait_on_their_shards(queue: ShardedEmbedQueue) -> None:
    jobs = [queue.enqueue_in(60, "later"), *queue.enqueue_many(["a", "b"], delay=60)]
    assert {job.status() for job in jobs} == {JobStatus.SCHEDULED}
    assert queue.depth() == 0


def test_jobs_come_as_they_end_whichever_shard_is_first(queue: ShardedEmbedQueue, drain_all: Drain) -> None:
    jobs = {name: queue.enqueue(name, job_id=ids_on(queue, name, 1)[0]) for name in NAMES}
    with ThreadPoolExecutor() as pool:
        completed = queue.as_completed(jobs.values(), timeout=60)
        for name in ("three", "one", "two"):
            first = pool.submit(next, completed)
            drain_all(name)
            assert first.result(timeout=60)[0] == jobs[name]
        assert next(completed, None) is None


def test_jobs_that_do_not_end_come_last_as_timeouts(queue: ShardedEmbedQueue, drain_all: Drain) -> None:
    jobs = queue.enqueue_many(map(str, range(12)))
    drain_all("two")
    outcomes = [outcome for _, outcome in queue.as_completed(jobs, timeout=0.2)]
    done = sum(home(queue, job.id) == "two" for job in jobs)
    assert [type(outcome) for outcome in outcomes] == [Embeddings] * done + [ResultTimeoutError] * (12 - done)


def test_a_stream_is_in_order_over_all_shards(queue: ShardedEmbedQueue, drain_all: Drain) -> None:
    texts = [f"text {number}" for number in range(300)]
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(lambda: list(queue.embed_stream(iter(texts), window=40, texts_per_job=3, timeout=60)))
        while not reading.done():
            drain_all()
        items = reading.result()
    assert [item.index for item in items] == list(range(300))
    assert all(np.array_equal(item.vector, vector(text)) for item, text in zip(items, texts, strict=True))


def test_a_stream_that_is_left_cancels_what_waits_on_every_shard(queue: ShardedEmbedQueue, drain_all: Drain) -> None:
    stream = queue.embed_stream(map(str, range(1000)), window=100, texts_per_job=1, ordered=False, timeout=60)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(next, stream)
        until(lambda: queue.depth() > 0)
        drain_all("one")
        first.result(timeout=60)
    assert queue.depth() > 0
    stream.close()  # type: ignore[attr-defined]
    assert queue.depth() == 0


def test_embed_is_one_result_and_the_cache_is_spread_too(
    queue: ShardedEmbedQueue, urls: dict[str, str], drain_all: Drain
) -> None:
    texts = [f"text {number}" for number in range(300)]
    with ThreadPoolExecutor() as pool:
        embedding = pool.submit(queue.embed, texts, timeout=60, cache_ttl=60, model="noop:8")
        while not embedding.done():
            drain_all()
        result = embedding.result()
    assert np.array_equal(result.vectors[299], vector("text 299"))
    for url in urls.values():
        with connect(url) as client:
            assert client.keys(keys.vector("*"))
    assert np.array_equal(queue.embed(texts, timeout=60, cache_ttl=60, model="noop:8").vectors, result.vectors)


def test_threads_share_one_client(queue: ShardedEmbedQueue) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda number: queue.enqueue(str(number)), range(80)))
    assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.QUEUED}
    assert sum(thread.name == "embedq shards" for thread in threading.enumerate()) == 1


def test_a_closed_client_says_so(urls: dict[str, str]) -> None:
    queue = ShardedEmbedQueue(urls)
    queue.enqueue("a text")
    queue.close()
    queue.close()
    with pytest.raises(QueueConnectionError, match="closed"):
        queue.depth()
    assert not any(thread.name == "embedq shards" for thread in threading.enumerate())


def test_who_still_waits_when_the_client_is_closed_is_told(urls: dict[str, str]) -> None:
    queue = ShardedEmbedQueue(urls)
    job = queue.enqueue("a text")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(job.result, timeout=None)
        until(lambda: queue._awaited._shards[home(queue, job.id)]._reader._watches)  # type: ignore[attr-defined]
        queue.close()
        with pytest.raises(QueueConnectionError):
            waiting.result(timeout=60)


def test_the_awaiting_client_does_the_same(urls: dict[str, str], drain_all: Drain) -> None:
    async def enqueue() -> list[str]:
        async with AsyncShardedEmbedQueue(urls) as queue:
            jobs = await queue.enqueue_many(map(str, range(30)), group="g")
            assert await queue.depth() == 30
            assert await queue.group("g").counts() == {JobStatus.QUEUED: 30}
            with pytest.raises(JobNotFoundError):
                await queue.result("unheard-of", timeout=0)
            return [job.id for job in jobs]

    async def read(job_ids: list[str]) -> None:
        async with AsyncShardedEmbedQueue(list(urls.values())) as renamed:  # other names: jobs are found all the same
            found = await renamed.results(job_ids, timeout=30)
            assert [outcome.vectors[0].tolist() for outcome in found.values()] == [  # type: ignore[union-attr]
                vector(str(number)).tolist() for number in range(30)
            ]
            seen = [job.id async for job, _ in renamed.as_completed(job_ids)]
            assert sorted(seen) == sorted(job_ids)

    job_ids = asyncio.run(enqueue())
    drain_all()
    asyncio.run(read(job_ids))


# --- what belongs together


def test_a_dependent_job_goes_where_what_it_depends_on_is(
    queue: ShardedEmbedQueue, urls: dict[str, str], drain_all: Drain
) -> None:
    for name in NAMES:
        first, second = ids_on(queue, name, 2)
        queue.enqueue_many(["a", "b"], job_ids=[first, second])
        dependent = queue.enqueue("c", depends_on=[first, second])
        assert home(queue, dependent.id) == name
        assert dependent.status() is JobStatus.DEFERRED
        drain_all(name)
        drain_all(name)
        assert len(dependent.result(timeout=10)) == 1


def test_dependencies_on_different_shards_are_refused(queue: ShardedEmbedQueue) -> None:
    [first], [second] = ids_on(queue, "one", 1), ids_on(queue, "two", 1)
    queue.enqueue_many(["a", "b"], job_ids=[first, second])
    with pytest.raises(InvalidOptionError, match=r"different shards: .* is on one, .* on two;.*id_beside"):
        queue.enqueue("c", depends_on=[first, second])
    with pytest.raises(InvalidOptionError, match="belongs to shard two, and what it depends on is on one"):
        queue.enqueue("c", job_id=ids_on(queue, "two", 1)[0], depends_on=first)
    with pytest.raises(JobNotFoundError, match="no job nowhere to depend on"):
        queue.enqueue("c", depends_on="nowhere")
    assert queue.depth() == 2


def test_an_id_beside_another_is_on_its_shard(queue: ShardedEmbedQueue) -> None:
    first = queue.enqueue("a")
    beside = queue.id_beside(first.id)
    assert beside != first.id
    assert queue.enqueue("b", job_id=beside, depends_on=first).status() is JobStatus.DEFERRED


def test_the_limit_of_depth_is_shared_out(queue: ShardedEmbedQueue) -> None:
    ids = {name: ids_on(queue, name, 3) for name in NAMES}
    for name in NAMES:
        queue.enqueue_many(["a", "b"], job_ids=ids[name][:2], max_depth=6)
    with pytest.raises(QueueFull, match=r"shard two: queue embed has 2 jobs and takes 2 at most"):
        queue.enqueue("c", job_id=ids["two"][2], max_depth=6)
    assert queue.depth() == 6


# --- shards that come and go


def test_jobs_from_before_a_shard_came_are_still_found(urls: dict[str, str], drain_all: Drain) -> None:
    with ShardedEmbedQueue({name: urls[name] for name in ("one", "two")}) as before:
        ids = [job.id for job in before.enqueue_many(map(str, range(60)))]
    with ShardedEmbedQueue(urls) as queue:
        moved = [job_id for job_id in ids if home(queue, job_id) == "three"]
        assert 5 < len(moved) < 40
        assert set(queue.statuses(ids).values()) == {JobStatus.QUEUED}
        assert queue.cancel(moved[0]) is True
        queue.requeue(moved[0])
        assert queue.enqueue("after", depends_on=moved[0]).status() is JobStatus.DEFERRED
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(queue.results, ids, timeout=60)  # begins before they end
            drain_all()
            assert all(isinstance(outcome, Embeddings) for outcome in waiting.result().values())


def test_a_dead_shard_costs_its_own_jobs_alone(
    queue: ShardedEmbedQueue, servers: dict[str, RedisServer], drain_all: Drain
) -> None:
    jobs = queue.enqueue_many(map(str, range(30)))
    drain_all("one", "three")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(queue.results, [job.id for job in jobs], timeout=None)
        servers["two"].kill()
        for job_id, outcome in waiting.result(timeout=60).items():
            assert isinstance(outcome, QueueConnectionError if home(queue, job_id) == "two" else Embeddings)


def test_jobs_with_ids_of_ours_go_to_the_shards_that_live(
    queue: ShardedEmbedQueue, servers: dict[str, RedisServer], drain_all: Drain
) -> None:
    servers["two"].kill()
    texts = [f"text {number}" for number in range(40)]
    jobs = [queue.enqueue("a text"), *queue.enqueue_many(texts)]
    assert {home(queue, job.id) for job in jobs} == {"one", "three"}
    drain_all("one", "three")
    found = queue.results([job.id for job in jobs[1:]], timeout=10)
    for text, outcome in zip(texts, found.values(), strict=True):
        assert isinstance(outcome, Embeddings)
        assert np.array_equal(outcome.vectors[0], vector(text))


def test_jobs_with_ids_of_the_callers_are_refused_with_their_shard(
    queue: ShardedEmbedQueue, servers: dict[str, RedisServer]
) -> None:
    servers["two"].kill()
    ids = [ids_on(queue, name, 1)[0] for name in ("one", "two", "three", "two")]
    with pytest.raises(PartialEnqueueError, match="2 of 4 jobs are enqueued; then: no Redis at") as caught:
        queue.enqueue_many(["a", "b", "c", "d"], job_ids=ids)
    assert caught.value.job_ids == [ids[0], ids[2]]
    assert caught.value.text_indexes == [0, 2]
    assert caught.value.retryable
    for call in (lambda: queue.enqueue("b", job_id=ids[1]), lambda: queue.status(ids[1]), queue.depth):
        with pytest.raises(QueueConnectionError, match=str(servers["two"].folder)):
            call()
    assert queue.status(ids[0]) is JobStatus.QUEUED


def test_a_job_that_is_to_run_once_at_most_goes_nowhere_else_after_a_failure(
    queue: ShardedEmbedQueue, servers: dict[str, RedisServer]
) -> None:
    servers["two"].kill()
    with pytest.raises(PartialEnqueueError) as caught:
        queue.enqueue_many(map(str, range(40)), retries=0)
    assert queue.statuses(caught.value.job_ids) == dict.fromkeys(caught.value.job_ids, JobStatus.QUEUED)
    assert {home(queue, job.id) for job in queue.enqueue_many(map(str, range(40)), retries=0)} == {"one", "three"}


def test_all_shards_gone_is_one_error(queue: ShardedEmbedQueue, servers: dict[str, RedisServer]) -> None:
    for server in servers.values():
        server.kill()
    for call in (lambda: queue.enqueue("a"), lambda: queue.enqueue_many(["a", "b"]), lambda: queue.embed("a")):
        with pytest.raises(QueueConnectionError, match="no Redis at"):
            call()


def test_a_stream_survives_a_shard(queue: ShardedEmbedQueue, servers: dict[str, RedisServer], drain_all: Drain) -> None:
    texts = [f"text {number}" for number in range(200)]
    with ThreadPoolExecutor() as pool:
        stream = queue.embed_stream(iter(texts), window=80, texts_per_job=2, timeout=60)
        reading = pool.submit(list, stream)
        until(lambda: queue.depth() >= 30)
        servers["two"].kill()
        while not reading.done():
            drain_all("one", "three")
        items = reading.result()
    assert [item.index for item in items] == list(range(200))
    assert all(np.array_equal(item.vector, vector(text)) for item, text in zip(items, texts, strict=True))


def test_one_server_is_a_queue_that_both_clients_share(urls: dict[str, str]) -> None:
    with ShardedEmbedQueue([urls["one"]]) as queue, EmbedQueue(urls["one"]) as plain:
        assert plain.status(queue.enqueue("a text").id) is JobStatus.QUEUED
        assert queue.status(plain.enqueue("a text").id) is JobStatus.QUEUED
