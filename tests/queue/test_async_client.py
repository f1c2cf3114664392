"""The awaited client against a real Redis: the same surface and the same results as the blocking one."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from embedq.producer import (
    AsyncEmbedJob,
    AsyncEmbedQueue,
    AsyncJobGroup,
    ConfigurationError,
    DuplicateJobError,
    Embeddings,
    EmbedJob,
    EmbedQueue,
    InvalidOptionError,
    InvalidTextError,
    JobCanceledError,
    JobFailedError,
    JobGroup,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    PartialEnqueueError,
    QueueAccessError,
    QueueConnectionError,
    QueueFull,
    ResultTimeoutError,
    keys,
    requests,
    round_trips,
    wire,
)
from embedq.producer.connection import connect_async
from tests.conftest import Drain
from tests.queue.test_client import vector
from tests.queue.test_worker import Start, start  # noqa: F401


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)
    gc.collect()


def public_methods(kind: type) -> dict[str, Callable[..., Any]]:
    return {
        name: method
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


# --- the same surface


@pytest.mark.parametrize(
    ("blocking", "awaited"), [(EmbedQueue, AsyncEmbedQueue), (EmbedJob, AsyncEmbedJob), (JobGroup, AsyncJobGroup)]
)
def test_every_public_method_takes_the_same_parameters(blocking: type, awaited: type) -> None:
    theirs, ours = public_methods(blocking), public_methods(awaited)
    assert ours.keys() == theirs.keys()
    for name, method in theirs.items():
        wanted = inspect.signature(method).parameters
        found = inspect.signature(ours[name]).parameters
        assert list(found) == list(wanted), name
        for parameter in wanted.values():
            assert found[parameter.name].kind is parameter.kind, f"{name}({parameter.name})"
            assert found[parameter.name].default == parameter.default, f"{name}({parameter.name})"


def test_the_client_is_loaded_on_its_first_use() -> None:
    code = (
        "import sys, embedq.producer; before = 'embedq.producer.async_queue' in sys.modules;"
        "from embedq.producer import AsyncEmbedQueue; print(before, AsyncEmbedQueue.__module__)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.split() == ["False", "embedq.producer.async_queue"]


# --- the same results


def test_a_job_goes_from_queued_to_finished_and_gives_its_vectors(url: str, drain: Drain) -> None:
    async def put() -> str:
        async with AsyncEmbedQueue(url) as queue:
            job = await queue.enqueue(["one", "two"], dimensions=4)
            assert repr(job) == f"AsyncEmbedJob({job.id!r})"
            assert await job.status() is JobStatus.QUEUED
            assert await queue.depth() == 1
            assert await queue.job(job.id) == job
            return job.id

    async def get(job_id: str) -> None:
        async with AsyncEmbedQueue(url) as queue:
            assert await queue.statuses([job_id, "nowhere"]) == {job_id: JobStatus.FINISHED, "nowhere": None}
            result = await (await queue.job(job_id)).result(timeout=5)
            assert result.vectors.shape == (2, 4)
            assert result.model == "noop:8"

    job_id = asyncio.run(put())
    drain()
    run(get(job_id))


def test_many_jobs_keep_their_order(url: str, drain: Drain) -> None:
    texts = [f"text {number}" for number in range(250)]

    async def put() -> list[str]:
        async with AsyncEmbedQueue(url) as queue:
            return [job.id for job in await queue.enqueue_many(iter(texts))]

    async def get(ids: list[str]) -> None:
        async with AsyncEmbedQueue(url) as queue:
            found = await queue.results(ids, timeout=5)
            assert list(found) == ids
            for text, outcome in zip(texts, found.values(), strict=True):
                assert isinstance(outcome, Embeddings)
                np.testing.assert_allclose(outcome.vectors[0], vector(text), atol=1e-7)

    ids = asyncio.run(put())
    drain()
    run(get(ids))


def test_what_cannot_be_is_refused_as_by_the_blocking_client(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "CHUNK_JOBS", 2)

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            with pytest.raises(InvalidTextError):
                await queue.enqueue([])
            with pytest.raises(JobNotFoundError, match="there is no job nowhere"):
                await queue.job("nowhere")
            with pytest.raises(JobNotFoundError):
                await queue.result("nowhere")
            await queue.enqueue("a", job_id="a")
            with pytest.raises(DuplicateJobError):
                await queue.enqueue("b", job_id="a")
            with pytest.raises(PartialEnqueueError) as told:
                await queue.enqueue_many(["x", "y", "b"], job_ids=["x", "y", "a"])
            assert told.value.job_ids == ["x", "y"]
            with pytest.raises(JobStateError):
                await queue.requeue("a")
            with pytest.raises(ResultTimeoutError, match=r"within 0\.01 s"):
                await queue.result("a", timeout=0.01)
            with pytest.raises(QueueFull):
                await queue.enqueue("c", max_depth=3)

    run(test())


def test_a_full_queue_is_waited_for_without_holding_up_others(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url, max_depth=1, block_timeout=10) as queue:
            first = await queue.enqueue("first")
            second = asyncio.create_task(queue.enqueue("second"))
            await asyncio.sleep(0.05)
            assert not second.done()
            assert await first.cancel()
            assert await (await second).status() is JobStatus.QUEUED

    run(test())


def test_a_job_can_be_canceled_and_requeued(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            job = await queue.enqueue("a text")
            waiting = asyncio.create_task(job.result(timeout=20))
            await asyncio.sleep(0.05)
            assert await job.cancel()
            with pytest.raises(JobCanceledError):
                await waiting
            assert not await job.cancel()
            await job.requeue(at_front=True)
            assert await job.status() is JobStatus.QUEUED

    run(test())


def test_jobs_come_as_they_end(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            jobs = await queue.enqueue_many(["a", "b", "c"], job_ids=["a", "b", "c"])
            await jobs[2].cancel()
            found = []
            async for job, outcome in queue.as_completed([jobs[0], "b", jobs[2]], timeout=0.5):
                found.append((job.id, type(outcome)))
                if job.id == "c":
                    await jobs[1].cancel()
            assert found == [("c", JobCanceledError), ("b", JobCanceledError), ("a", ResultTimeoutError)]

    run(test())


def test_a_group_is_counted_awaited_and_canceled(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            jobs = await queue.enqueue_many(["a", "b", "c"], group="night")
            group = queue.group("night")
            assert repr(group) == "AsyncJobGroup('night')"
            assert sorted(await group.job_ids()) == sorted(job.id for job in jobs)
            await jobs[0].cancel()
            assert await group.counts() == {JobStatus.CANCELED: 1, JobStatus.QUEUED: 2}
            assert await group.cancel() == 2
            assert {type(outcome) for outcome in (await group.results(timeout=0)).values()} == {JobCanceledError}
            with pytest.raises(InvalidOptionError):
                queue.group("")

    run(test())


# --- embed


def test_embed_waits_and_joins_several_jobs(url: str, start: Start) -> None:  # noqa: F811
    start()
    texts = [f"text {number}" for number in range(150)]

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            whole, one, cached, again = await asyncio.gather(
                queue.embed(texts, timeout=30),
                queue.embed("one", timeout=30),
                queue.embed(["two", "three"], timeout=30, cache_ttl=100, model="noop:8"),
                queue.embed(texts[:3], timeout=30, dedupe=True),
            )
            np.testing.assert_allclose(whole.vectors, [vector(text) for text in texts], atol=1e-7)
            np.testing.assert_allclose(one.vectors, [vector("one")], atol=1e-7)
            np.testing.assert_array_equal(again.vectors, whole.vectors[:3])
            stored = await queue.embed(["three"], timeout=0, cache_ttl=100, model="noop:8")
            np.testing.assert_array_equal(stored.vectors, cached.vectors[1:])

    run(test())


def test_embed_cancels_what_still_waits_when_it_is_late_or_canceled(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            with pytest.raises(ResultTimeoutError, match=r"100 texts took more than 0\.1 s"):
                await queue.embed(["a"] * 100, timeout=0.1)
            assert await queue.depth() == 0
            embedding = asyncio.create_task(queue.embed(["a"] * 100))
            while await queue.depth() < 2:
                await asyncio.sleep(0.01)
            embedding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await embedding
            assert await queue.depth() == 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await queue.embed("a")
            assert await queue.depth() == 0
            with pytest.raises(InvalidTextError):
                await queue.embed([])

    run(test())


def test_embed_raises_the_first_failure_in_the_callers_count(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            embedding = asyncio.create_task(queue.embed(["a"] * 100))
            while await queue.depth() < 2:
                await asyncio.sleep(0.01)
            [_, second] = await queue._redis.lrange(keys.queue("embed"), 0, -1)
            failure = JobFailedError("the text is too long", code="text_too_long", text_index=3)
            await queue._redis.xadd(
                keys.results(second.decode()), {"type": 2, "exc_string": wire.encode_exc_string(failure)}
            )
            with pytest.raises(JobFailedError) as told:
                await embedding
            assert told.value.text_index == 64 + 3
            assert await queue.depth() == 0

    run(test())


# --- streams


async def trickling(texts: list[str]) -> AsyncIterator[str]:
    for number, text in enumerate(texts):
        if number % 50 == 0:
            await asyncio.sleep(0.001)
        yield text


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("source", [iter, trickling])
def test_every_text_of_a_stream_comes_out_once_with_its_vector(
    url: str,
    start: Start,  # noqa: F811
    ordered: bool,
    source: Any,
) -> None:
    start()
    texts = [f"text {number}" for number in range(3000)]

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            stream = queue.embed_stream(source(texts), window=500, ordered=ordered, texts_per_job=7, timeout=30)
            items = [item async for item in stream]
            if ordered:
                assert [item.index for item in items] == list(range(3000))
            found = sorted(items, key=lambda item: item.index)
            np.testing.assert_allclose(
                np.stack([item.vector for item in found]), [vector(text) for text in texts], atol=1e-7
            )
            assert await queue._redis.keys("rq:job:*") == []
            assert await queue.depth() == 0
        assert len(asyncio.all_tasks()) == 1

    run(test())


def test_texts_that_trickle_are_sent_on_as_they_come(url: str, start: Start) -> None:  # noqa: F811
    start()
    seen: list[int] = []

    async def slowly() -> AsyncIterator[str]:
        for number in range(5):
            while len(seen) < number:
                await asyncio.sleep(0.005)
            yield f"text {number}"

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            async for item in queue.embed_stream(slowly(), timeout=20):
                seen.append(item.index)  # noqa: PERF401 - the source looks at it
        assert seen == [0, 1, 2, 3, 4]

    run(test())


def test_leaving_a_stream_early_cancels_what_still_waits(url: str, start: Start) -> None:  # noqa: F811
    async def endless() -> AsyncIterator[str]:
        for number in itertools.count():
            yield str(number)

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            with pytest.raises(ResultTimeoutError, match=r"came back for 0\.1 s"):
                await anext(queue.embed_stream(endless(), window=8, texts_per_job=1, timeout=0.1))
            assert await queue.depth() == 0
            start()
            async with aclosing(queue.embed_stream(endless(), window=80, texts_per_job=1, timeout=20)) as stream:
                async for item in stream:
                    if item.index == 10:
                        break
            assert await queue.depth() == 0
        assert len(asyncio.all_tasks()) == 1

    run(test())


def test_an_error_of_the_source_cancels_and_passes_through(url: str) -> None:
    async def breaks() -> AsyncIterator[str]:
        for text in "abcd":
            yield text
        raise RuntimeError("the disk is gone")

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            with pytest.raises(RuntimeError, match="the disk is gone"):
                await anext(queue.embed_stream(breaks(), texts_per_job=1))
            assert await queue.depth() == 0
            with pytest.raises(InvalidTextError, match="takes any number of texts"):
                queue.embed_stream("one")
            with pytest.raises(InvalidOptionError, match="window must be a whole number"):
                queue.embed_stream(["one"], window=0)

    run(test())


def test_a_text_that_fails_ends_the_stream_or_comes_out_as_an_item(url: str, start: Start) -> None:  # noqa: F811
    start()
    texts: list[Any] = ["a", None, "b"]

    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            items = [item async for item in queue.embed_stream(texts, on_error="yield", timeout=20)]
            assert [type(item.error) for item in items] == [type(None), InvalidTextError, type(None)]
            with pytest.raises(InvalidTextError):
                _ = [item async for item in queue.embed_stream(texts, timeout=20)]
            assert await queue.depth() == 0

    run(test())


# --- connections


def test_thousands_of_waiting_callers_share_a_few_connections(url: str, drain: Drain) -> None:
    callers = 5000
    progress: dict[str, Any] = {}

    async def call(queue: AsyncEmbedQueue, number: int) -> None:
        job = await queue.enqueue(f"text {number}")
        progress["waiting"] = progress.get("waiting", 0) + 1
        result = await job.result(timeout=100)
        np.testing.assert_allclose(result.vectors[0], vector(f"text {number}"), atol=1e-7)

    async def test() -> None:
        async with connect_async(url) as admin, AsyncEmbedQueue(url) as queue:
            calls = [asyncio.create_task(call(queue, number)) for number in range(callers)]
            while progress.get("waiting") != callers:
                await asyncio.sleep(0.01)
            progress["most"] = len(await admin.client_list())  # type: ignore[no-untyped-call]
            working = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "embedq.worker.cli", "worker", "--url", url, "--model", "noop:8", "--burst")
            )
            await asyncio.gather(*calls)
            assert await working.wait() == 0

    run(test())
    assert progress["most"] <= round_trips.MAX_CONNECTIONS + 3


def test_a_pool_of_six_connections_is_enough_for_any_number_of_callers(url: str, start: Start) -> None:  # noqa: F811
    start()

    async def test() -> None:
        async with connect_async(url, max_connections=6) as client, AsyncEmbedQueue(connection=client) as queue:
            results = await asyncio.gather(*(queue.embed(str(number), timeout=30) for number in range(500)))
            for number, result in enumerate(results):
                np.testing.assert_allclose(result.vectors[0], vector(str(number)), atol=1e-7)

    run(test())


def test_callers_of_a_shared_client_keep_it(url: str) -> None:
    async def test() -> None:
        async with connect_async(url) as client:
            async with AsyncEmbedQueue(connection=client) as queue:
                assert await queue.depth() == 0
            assert await client.ping()  # type: ignore[misc]

    run(test())


def test_closing_ends_what_is_under_way(url: str) -> None:
    async def test() -> None:
        async with AsyncEmbedQueue(url) as queue:
            texts = (str(number) for number in itertools.count())
            calls: list[Any] = [
                asyncio.create_task(queue.embed("a", timeout=None)),
                asyncio.create_task((await queue.enqueue("b")).result(timeout=None)),
                asyncio.create_task(anext(queue.embed_stream(texts, window=8, timeout=None))),
                asyncio.create_task(queue.enqueue("c", max_depth=1, block_timeout=100)),
            ]
            while await queue.depth() < 2 + 1:
                await asyncio.sleep(0.01)
        for call in calls:
            with pytest.raises(QueueConnectionError, match="was closed"):
                await call
        with pytest.raises(QueueConnectionError, match="was closed"):
            await queue.depth()
        assert len(asyncio.all_tasks()) == 1

    run(test())


def test_a_connection_cut_in_the_middle_is_not_noticed(url: str, start: Start) -> None:  # noqa: F811
    async def test() -> None:
        async with connect_async(url) as admin, AsyncEmbedQueue(url) as queue:
            jobs = await queue.enqueue_many(map(str, range(300)))
            calls = [asyncio.create_task(job.result(timeout=30)) for job in jobs]
            stream = queue.embed_stream(map(str, range(3000)), texts_per_job=3, window=100, timeout=30)
            start()
            async for item in stream:
                if item.index % 500 == 0:
                    await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert item.index == 2999
            for number, result in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_allclose(result.vectors[0], vector(str(number)), atol=1e-7)

    run(test())


def test_what_cannot_work_is_told_at_once(url: str) -> None:
    async def test() -> None:
        with pytest.raises(ConfigurationError, match="is no Redis URL"):
            AsyncEmbedQueue("http://localhost")
        with pytest.raises(ConfigurationError, match="not both"):
            AsyncEmbedQueue(url, connection=connect_async(url))
        with pytest.raises(ConfigurationError, match="decode_responses"):
            AsyncEmbedQueue(connection=connect_async(url, decode_responses=True))
        async with AsyncEmbedQueue("unix:///nowhere/redis.sock") as queue:
            with pytest.raises(QueueConnectionError, match="no Redis at /nowhere"):
                await queue.enqueue("a")
            with pytest.raises(QueueConnectionError, match="no Redis at /nowhere"):
                await queue.result("a")
        async with connect_async(url) as admin:
            await admin.execute_command("ACL", "SETUSER", "nobody", "reset", "on", ">pw", "-@all")
        async with AsyncEmbedQueue(connection=connect_async(url, username="nobody", password="pw")) as queue:
            with pytest.raises(QueueAccessError, match="does not permit this to its user"):
                await queue.depth()
            await queue._client.aclose()

    run(test())


def test_a_string_is_no_list_of_ids(url: str) -> None:
    async def ask() -> None:
        async with AsyncEmbedQueue(url) as queue:
            job = await queue.enqueue("text")
            assert list(await queue.results(job.id, timeout=0)) == [job.id]
            assert list(await queue.statuses(job.id)) == [job.id]

    run(ask())
