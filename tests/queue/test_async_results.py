"""Many awaiting calls on one blocking read: woken at once, each told its own job, whatever happens to the others."""

from __future__ import annotations

import asyncio
import base64
import gc
import resource
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from embedq.producer import (
    Embeddings,
    JobCanceledError,
    JobFailedError,
    JobNotFoundError,
    QueueConnectionError,
    QueueServerError,
    ResultTimeoutError,
    async_results,
    keys,
    wire,
)
from embedq.producer.async_results import AsyncResultReader
from embedq.producer.connection import connect_async
from embedq.producer.outcomes import Outcome
from embedq.producer.result_streams import ResultStreams, bulk


def result_of(number: float) -> Embeddings:
    return Embeddings(
        vectors=np.full((1, 4), number, dtype=np.float32), num_tokens=(1,), truncated=(False,), model="noop:4"
    )


async def start(client: Any, *job_ids: str, status: str = "started") -> None:
    async with client.pipeline() as pipeline:
        for job_id in job_ids:
            pipeline.hset(keys.job(job_id), "status", status)
        await pipeline.execute()


async def end(client: Any, job_id: str, number: float = 1.0, kind: int = 1, status: str = "finished") -> None:
    """As a worker ends a job."""
    fields: dict[str, Any] = {"type": kind}
    if kind == 1:
        fields["return_value"] = base64.b64encode(wire.encode_result(result_of(number)))
    if kind == 2:
        fields["exc_string"] = wire.encode_exc_string(JobFailedError("the model burst", code="burst"))
    async with client.pipeline() as pipeline:
        pipeline.hset(keys.job(job_id), "status", status)
        pipeline.xadd(keys.results(job_id), fields)
        await pipeline.execute()


async def wait_for(reader: AsyncResultReader, job_id: str, timeout_s: float | None = 10) -> Outcome:
    [(_, outcome)] = [pair async for pair in reader.outcomes([job_id], timeout_s)]
    return outcome


def first(outcome: Outcome) -> float:
    assert isinstance(outcome, Embeddings)
    return float(outcome.vectors[0, 0])


@asynccontextmanager
async def reading(url: str, **options: Any) -> AsyncIterator[tuple[AsyncResultReader, Any]]:
    """A reader, and a client to play the worker with."""
    client: Any = connect_async(url, **options)
    reader = AsyncResultReader(client)
    try:
        yield reader, client
    finally:
        await reader.close()
        await client.aclose()
    assert len(asyncio.all_tasks()) == 1, "a task is left"


async def until_blocked(client: Any, number: int = 1) -> dict[str, str]:
    """The one connection that is blocked by a read, with `number` of them."""
    for _ in range(2000):
        blocked = [one for one in await client.client_list() if "b" in one["flags"] and one["cmd"] == "xread"]
        if len(blocked) == number:
            return dict(blocked[0])
        await asyncio.sleep(0.005)
    raise AssertionError("no read blocks")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)
    gc.collect()


# --- outcomes


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_job_wakes_its_caller_when_it_ends(each_url: str, protocol: int) -> None:
    async def test() -> None:
        async with reading(each_url, protocol=protocol) as (reader, client):
            await start(client, "a", "b", "c")
            calls = {job_id: asyncio.create_task(wait_for(reader, job_id)) for job_id in "abc"}
            await until_blocked(client)
            await end(client, "b", 7.0)
            assert first(await calls["b"]) == 7.0
            assert not calls["a"].done()
            await end(client, "c", kind=2, status="failed")
            assert (await calls["c"]).code == "burst"  # type: ignore[union-attr]
            await end(client, "a", kind=3, status="canceled")
            assert isinstance(await calls["a"], JobCanceledError)

    run(test())


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_job_that_ended_before_is_told_by_the_first_look(each_url: str, protocol: int) -> None:
    async def test() -> None:
        async with reading(each_url, protocol=protocol) as (reader, client):
            await end(client, "done", 3.0)
            await start(client, "canceled", status="canceled")
            await start(client, "running")
            assert first(await wait_for(reader, "done", 0)) == 3.0
            assert isinstance(await wait_for(reader, "canceled", 0), JobCanceledError)
            assert isinstance(await wait_for(reader, "nowhere", 0), JobNotFoundError)
            assert isinstance(await wait_for(reader, "running", 0), ResultTimeoutError)

    run(test())


def test_a_job_that_is_retried_is_waited_for_on(url: str) -> None:
    async def test() -> None:
        async with reading(url) as (reader, client):
            await start(client, "a")
            call = asyncio.create_task(wait_for(reader, "a"))
            await until_blocked(client)
            await client.xadd(keys.results("a"), {"type": 4})
            await asyncio.sleep(0.05)
            assert not call.done()
            await end(client, "a", 5.0)
            assert first(await call) == 5.0

    run(test())


def test_the_failure_before_a_requeue_is_not_told_again(url: str) -> None:
    async def test() -> None:
        async with reading(url) as (reader, client):
            await end(client, "a", kind=2, status="failed")
            await start(client, "a", status="queued")
            call = asyncio.create_task(wait_for(reader, "a"))
            await until_blocked(client)
            await end(client, "a", 2.0)
            assert first(await call) == 2.0

    run(test())


def test_several_calls_may_wait_for_one_job(url: str) -> None:
    async def test() -> None:
        async with reading(url) as (reader, client):
            await start(client, "a")
            calls = [asyncio.create_task(wait_for(reader, "a")) for _ in range(5)]
            await until_blocked(client)
            calls[0].cancel()
            await end(client, "a", 4.0)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(outcomes[0], asyncio.CancelledError)
            assert [first(outcome) for outcome in outcomes[1:]] == [4.0] * 4  # type: ignore[arg-type]

    run(test())


def test_one_call_may_wait_for_many_jobs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "LOOK_JOBS", 10)

    async def test() -> None:
        async with reading(url) as (reader, client):
            ids = [f"job{number}" for number in range(35)]
            await start(client, *ids[5:])
            for number, job_id in enumerate(ids[:5]):
                await end(client, job_id, number)

            async def finish() -> None:
                for number, job_id in enumerate(ids[5:], 5):
                    await end(client, job_id, number)

            finishing = asyncio.create_task(finish())
            found = {job_id: first(outcome) async for job_id, outcome in reader.outcomes(ids, 10)}
            await finishing
            assert found == {job_id: float(number) for number, job_id in enumerate(ids)}

    run(test())


def test_what_has_not_ended_in_time_is_late_and_the_rest_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "LOOK_JOBS", 4)

    async def test() -> None:
        async with reading(url) as (reader, client):
            ids = [f"job{number}" for number in range(12)]
            await start(client, *ids)
            await end(client, "job11", 11.0)
            found = {job_id: outcome async for job_id, outcome in reader.outcomes(ids, 0.05)}
            assert [job_id for job_id in ids if isinstance(found[job_id], ResultTimeoutError)] == ids[:11]
            assert first(found["job11"]) == 11.0
            assert str(found["job0"]) == "no result of job job0 within 0.05 s; the job goes on, ask again later"

    run(test())


# --- jobs that end without a word


def test_a_job_that_expires_or_that_another_tool_cancels_is_found(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "LOOK_AGAIN_S", 0.1)

    async def test() -> None:
        async with reading(url) as (reader, client):
            await start(client, "gone", "canceled", "running")
            calls = [asyncio.create_task(wait_for(reader, job_id)) for job_id in ("gone", "canceled", "running")]
            await until_blocked(client)
            await client.delete(keys.job("gone"))
            await start(client, "canceled", status="canceled")
            assert isinstance(await calls[0], JobNotFoundError)
            assert isinstance(await calls[1], JobCanceledError)
            assert not calls[2].done()
            calls[2].cancel()

    run(test())


def test_each_watched_job_has_its_second_look_however_many_there_are(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(async_results, "LOOK_JOBS", 3)

    async def test() -> None:
        async with reading(url) as (reader, client):
            ids = [f"job{number}" for number in range(20)]
            await start(client, *ids)
            calls = [asyncio.create_task(wait_for(reader, job_id)) for job_id in ids]
            await until_blocked(client)
            await client.delete(*map(keys.job, ids))
            assert {type(outcome) for outcome in await asyncio.gather(*calls)} == {JobNotFoundError}

    run(test())


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_key_of_another_type_fails_its_job_alone(each_url: str, is_watched: bool) -> None:
    async def test() -> None:
        async with reading(each_url) as (reader, client):
            await start(client, "good", "bad")
            if not is_watched:
                await client.set(keys.results("bad"), "no stream")
            calls = [asyncio.create_task(wait_for(reader, job_id)) for job_id in ("good", "bad")]
            await until_blocked(client)
            if is_watched:
                await client.set(keys.results("bad"), "no stream")
                await start(client, "other")
                calls.append(asyncio.create_task(wait_for(reader, "other")))
            assert isinstance(await calls[1], QueueServerError)
            await end(client, "good", 6.0)
            assert first(await calls[0]) == 6.0
            for call in calls:
                call.cancel()

    run(test())


def test_what_stands_in_a_stream_is_not_fetched_whole(each_url: str) -> None:
    async def test() -> None:
        async with reading(each_url) as (_, client):
            for number in range(50):
                await client.xadd(keys.results("a"), {"type": 4, "x": bytes(100_000)}, id=f"{number + 1}-0")
            before = (await client.info("stats"))["total_net_output_bytes"]
            streams, key = ResultStreams(client), keys.results("a").encode()
            for last in (b"0-0", b"1-0"):
                [(found, entry_id, fields)] = await streams.read([(bulk(key), bulk(last))], 0.1)
                assert (found, int(entry_id[:1]), fields[b"type"]) == (key, int(last[:1]) + 1, b"4")
            await streams.release()
            assert (await client.info("stats"))["total_net_output_bytes"] - before < 500_000

    run(test())


# --- joining a read under way


def test_a_late_subscriber_does_not_wait_for_the_read_under_way(each_url: str) -> None:
    async def test() -> None:
        async with reading(each_url) as (reader, client):
            ids = [f"job{number}" for number in range(20)]
            await start(client, "slow", *ids)
            slow = asyncio.create_task(wait_for(reader, "slow"))
            await until_blocked(client)
            began = time.monotonic()
            for job_id in ids:
                call = asyncio.create_task(wait_for(reader, job_id))
                await asyncio.sleep(0.01)
                await end(client, job_id)
                await call
            assert time.monotonic() - began < async_results.BLOCK_S, "each of 20 waited for one read to end"
            assert not slow.done()
            slow.cancel()

    run(test())


def test_where_call_offs_are_not_permitted_newcomers_still_have_their_turn(url: str) -> None:
    async def test() -> None:
        async with connect_async(url) as admin:
            await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">pw", "~*", "+@all", "-client")
        async with reading(url, username="app", password="pw") as (reader, client):
            await start(client, "slow", "late")
            slow = asyncio.create_task(wait_for(reader, "slow"))
            await asyncio.sleep(0.1)
            late = asyncio.create_task(wait_for(reader, "late"))
            await asyncio.sleep(0.05)
            await end(client, "late", 2.0)
            assert first(await asyncio.wait_for(late, async_results.LOOK_AGAIN_S / 2)) == 2.0
            await end(client, "slow")
            await slow

    run(test())


def test_more_streams_than_fit_one_read_have_turns(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "READ_WINDOW", 8)

    async def test() -> None:
        async with reading(url) as (reader, client):
            ids = [f"job{number}" for number in range(50)]
            await start(client, *ids)
            calls = [asyncio.create_task(wait_for(reader, job_id)) for job_id in ids]
            await until_blocked(client)
            for number, job_id in reversed(list(enumerate(ids))):
                await end(client, job_id, number)
            assert [first(outcome) for outcome in await asyncio.gather(*calls)] == list(map(float, range(50)))

    run(test())


# --- what breaks


def test_a_connection_that_is_cut_is_made_anew_and_nothing_is_missed(each_url: str) -> None:
    async def test() -> None:
        async with reading(each_url) as (reader, client):
            await start(client, "a", "b")
            calls = [asyncio.create_task(wait_for(reader, job_id)) for job_id in "ab"]
            for number, job_id in enumerate("ab"):
                blocked = await until_blocked(client)
                async with client.pipeline(transaction=True) as pipeline:
                    pipeline.execute_command("CLIENT", "KILL", "ID", blocked["id"])
                    await pipeline.execute()
                await end(client, job_id, number)
                assert first(await calls[number]) == number

    run(test())


def test_waiting_calls_are_told_when_redis_is_gone_for_good(short_path: Any) -> None:
    from embedq.worker.redis_server import RedisServer
    from tests.conftest import redis_binaries

    async def test() -> None:
        with RedisServer(short_path, binary=redis_binaries()[0]) as server:
            async with reading(server.url) as (reader, client):
                await start(client, "a", "b")
                calls = [asyncio.create_task(wait_for(reader, job_id)) for job_id in "ab"]
                await until_blocked(client)
                server.stop()
                ends = await asyncio.gather(*calls, return_exceptions=True)
                for err in ends:
                    assert isinstance(err, QueueConnectionError)
                    assert str(err).startswith("no Redis at ")
                assert ends[0] is not ends[1], "each call raises an error of its own"
                with pytest.raises(QueueConnectionError):
                    await wait_for(reader, "c")

    run(test())


def test_refused_credentials_are_told(url: str) -> None:
    async def test() -> None:
        async with connect_async(url) as admin:
            await admin.execute_command("ACL", "SETUSER", "blind", "reset", "on", ">pw", "~*", "+@all", "-xread")
        async with reading(url, username="blind", password="pw") as (reader, client):
            await start(client, "a")
            with pytest.raises(QueueConnectionError, match="does not permit this to its user"):
                await wait_for(reader, "a")

    run(test())


def test_closing_fails_those_who_wait_and_leaves_no_task_and_no_connection(url: str) -> None:
    async def test() -> None:
        async with connect_async(url) as admin:
            async with reading(url) as (reader, client):
                await start(client, "a")
                call = asyncio.create_task(wait_for(reader, "a", None))
                await until_blocked(client)
                await reader.close()
                with pytest.raises(QueueConnectionError, match="closed"):
                    await call
                with pytest.raises(QueueConnectionError, match="closed"):
                    await wait_for(reader, "a")
            assert len(await admin.client_list()) == 1

    run(test())


def test_a_canceled_call_unsubscribes_and_the_task_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_results, "LOOK_AGAIN_S", 0.05)

    async def test() -> None:
        async with reading(url) as (reader, client):
            ids = [f"job{number}" for number in range(10)]
            await start(client, *ids)
            calls = [asyncio.create_task(wait_for(reader, job_id, None)) for job_id in ids]
            await until_blocked(client)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert reader._task is not None
            await asyncio.wait_for(reader._task, 5)
            assert not reader._watches
            await end(client, "job3", 3.0)
            assert first(await wait_for(reader, "job3")) == 3.0

    run(test())


# --- what it costs


def test_waiting_costs_next_to_nothing(url: str) -> None:
    async def test() -> None:
        async with reading(url) as (reader, client):
            ids = [f"job{number}" for number in range(1000)]
            await start(client, *ids)
            calls = [asyncio.create_task(wait_for(reader, job_id, None)) for job_id in ids]
            await until_blocked(client)
            before = resource.getrusage(resource.RUSAGE_SELF)
            await asyncio.sleep(3)
            after = resource.getrusage(resource.RUSAGE_SELF)
            assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.3
            for call in calls:
                call.cancel()

    run(test())
