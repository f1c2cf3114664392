"""Many calls at a time go in few round trips, and each has its own answer whatever the others come to."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import redis

from embedq.producer import AsyncEmbedQueue, DuplicateJobError, QueueConnectionError, QueueServerError, round_trips
from embedq.producer.connection import connect_async
from embedq.producer.round_trips import RoundTrips


def run(url: str, test: Callable[[RoundTrips, Any], Coroutine[Any, Any, None]]) -> None:
    async def with_client() -> None:
        async with connect_async(url) as client:
            trips = RoundTrips(client)
            await test(trips, client)
            await trips.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(with_client())
    gc.collect()


def count_trips(trips: RoundTrips, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of commands of each round trip from now on."""
    sizes: list[int] = []
    go = trips._go

    async def counted(commands: Any) -> list[Any]:
        sizes.append(len(commands))
        return await go(commands)

    monkeypatch.setattr(trips, "_go", counted)
    return sizes


def test_what_comes_while_all_connections_are_busy_goes_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(trips: RoundTrips, client: Any) -> None:
        sizes = count_trips(trips, monkeypatch)
        asked = [trips.ask([("INCR", "n"), ("ECHO", number)]) for number in range(5000)]
        replies = await asyncio.gather(*asked)
        assert sorted(count for count, _ in replies) == list(range(1, 5001))
        assert [int(echo) for _, echo in replies] == list(range(5000))
        assert len(sizes) < 20
        assert len(await client.client_list()) <= round_trips.MAX_CONNECTIONS

    run(url, test)


def test_a_refused_command_fails_its_call_alone(each_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trips, "MAX_CONNECTIONS", 1)

    async def test(trips: RoundTrips, client: Any) -> None:
        await client.set("text", "no number")
        asked = [trips.ask([("INCR", "text" if number % 7 == 3 else "n")]) for number in range(50)]
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for number, reply in enumerate(replies):
            assert isinstance(reply, redis.ResponseError) == (number % 7 == 3)

    run(each_url, test)


def test_a_canceled_call_leaves_the_others_their_answers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trips, "MAX_CONNECTIONS", 1)

    async def test(trips: RoundTrips, client: Any) -> None:
        asked = [asyncio.create_task(trips.ask([("ECHO", number)])) for number in range(60)]
        await asyncio.sleep(0)
        for number in range(0, 60, 2):
            asked[number].cancel()
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for number, reply in enumerate(replies):
            if number % 2:
                assert int(reply[0]) == number  # type: ignore[index]
            else:
                assert isinstance(reply, asyncio.CancelledError)

    run(url, test)


def test_calls_one_after_the_other_never_wait_for_nobody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that comes just as the last turn ends."""
    monkeypatch.setattr(round_trips, "MAX_CONNECTIONS", 2)

    async def test(trips: RoundTrips, client: Any) -> None:
        async def caller(pause: int) -> None:
            for number in range(100):
                for _ in range((number + pause) % 4):
                    await asyncio.sleep(0)
                assert int((await trips.ask([("ECHO", number)]))[0]) == number

        await asyncio.gather(*(caller(pause) for pause in range(7)))
        assert trips._num_busy == 0

    run(url, test)


def test_closing_lets_what_is_under_way_end_and_refuses_the_rest(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trips, "MAX_CONNECTIONS", 1)

    async def test(trips: RoundTrips, client: Any) -> None:
        asked = [asyncio.create_task(trips.ask([("ECHO", number)])) for number in range(5)]
        await asyncio.sleep(0)
        await trips.close()
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert ends[0] == [b"0"]
        assert {type(end) for end in ends[1:]} == {QueueConnectionError}
        with pytest.raises(QueueConnectionError, match="was closed"):
            await trips.ask([("PING",)])

    run(url, test)


def test_a_script_that_the_server_lost_is_loaded_once_for_all_who_miss_it(url: str) -> None:
    async def test() -> None:
        async with connect_async(url) as admin, AsyncEmbedQueue(url) as queue:
            for _ in range(2):
                await admin.script_flush()
                await admin.config_resetstat()
                await asyncio.gather(*(queue.enqueue(str(number)) for number in range(500)))
                stats: Any = await admin.info("commandstats")
                assert stats["cmdstat_script"]["calls"] == 1
            assert await queue.depth() == 1000

    asyncio.run(test())


def test_each_enqueue_has_its_own_fate(url: str) -> None:
    async def test() -> None:
        async with connect_async(url) as admin, AsyncEmbedQueue(url) as queue:
            asked = [queue.enqueue(str(number), job_id=f"job{number % 90}") for number in range(100)]
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert sum(isinstance(end, DuplicateJobError) for end in ends) == 10
            assert await queue.depth() == 90
            used = (await admin.info("memory"))["used_memory"]
            await admin.config_set("maxmemory", used)
            try:
                ends = await asyncio.gather(*(queue.enqueue("x" * 50_000) for _ in range(50)), return_exceptions=True)
            finally:
                await admin.config_set("maxmemory", 0)
            refused = sum(isinstance(end, QueueServerError) for end in ends)
            assert refused > 0
            assert await queue.depth() == 90 + 50 - refused

    asyncio.run(test())
