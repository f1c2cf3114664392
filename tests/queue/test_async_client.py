"""The awaited client against a real Redis: the same surface and the same results as the blocking one."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from embedq.producer import (
    AsyncEmbedJob,
    AsyncEmbedQueue,
    DuplicateJobError,
    Embeddings,
    EmbedJob,
    EmbedQueue,
    InvalidTextError,
    JobCanceledError,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    PartialEnqueueError,
    QueueFull,
    ResultTimeoutError,
    requests,
)
from embedq.producer import async_queue as async_queue_module
from embedq.producer.connection import connect_async
from tests.conftest import Drain
from tests.queue.test_client import vector


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


@pytest.mark.parametrize(("blocking", "awaited"), [(EmbedQueue, AsyncEmbedQueue), (EmbedJob, AsyncEmbedJob)])
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
    assert progress["most"] <= async_queue_module.MAX_CONNECTIONS + 3
