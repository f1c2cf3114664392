"""A worker's first moments: a Redis that is not there yet, a model that takes its time, and a signal meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from embedq.producer import EmbedQueue, JobStatus, QueueConnectionError, keys
from embedq.producer.connection import connect
from embedq.worker import startup
from embedq.worker.redis_server import RedisServer, free_port
from embedq.worker.startup import until_served
from tests.conftest import until
from tests.queue.test_worker import EMBEDQ, Start, fill_up, make_replica, start, workers  # noqa: F401
from tests.queue.worker_programs import isolated, isolated_pid, program

#: A model whose loading takes long, in Python or inside a library.
SLOW_MODELS = {
    "python": "time.sleep(60)",
    "library": "ctypes.CDLL(None).sleep(60)",
}
#: Seconds within which a worker that is told to leave has left, interpreter and all.
AT_ONCE_S = 5.0


def slow_model(folder: Path, kind: str) -> list[str]:
    return program(
        folder,
        "import ctypes, time\n"
        "import embedq.worker.worker as worker\n"
        "def load(settings):\n"
        "    print('loading the model', flush=True)\n"
        f"    {SLOW_MODELS[kind]}\n"
        "worker.load_encoder = load\n",
    )


class Away:
    """Something that Redis cannot do the first few times."""

    def __init__(self, *errors: redis.RedisError) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "served"


# --- waiting


def test_the_pauses_double_up_to_ten_seconds_and_each_is_told(caplog: pytest.LogCaptureFixture) -> None:
    slept: list[float] = []
    with connect("redis://ann:s3cret@somewhere/0") as client:
        away = Away(*(redis.ConnectionError("away") for _ in range(7)))
        assert until_served(client, away, None, slept.append) == "served"
    assert slept == [0.5, 1, 2, 4, 8, 10, 10]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 7
    assert all(line.startswith("waiting for Redis, next attempt in ") and "\n" not in line for line in lines)
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "err",
    [
        redis.ReadOnlyError("READONLY You can't write against a read only replica."),
        redis.BusyLoadingError("LOADING Redis is loading the dataset in memory"),
        redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
        redis.OutOfMemoryError("OOM command not allowed when used memory > 'maxmemory'."),
        redis.TimeoutError("Timeout reading from socket"),
        redis.sentinel.MasterNotFoundError("no Sentinel names a live master"),
    ],
    ids=lambda err: type(err).__name__,
)
def test_what_passes_is_waited_for(err: redis.RedisError) -> None:
    with connect("redis://somewhere/0") as client:
        assert until_served(client, Away(err), None, lambda _: None) == "served"
        with pytest.raises(type(err)):
            until_served(client, Away(err), 0, lambda _: None)


@pytest.mark.parametrize(
    "err",
    [
        redis.AuthenticationError("invalid username-password pair"),
        redis.ResponseError("NOAUTH Authentication required."),
        redis.exceptions.NoPermissionError("this user has no permissions"),
        redis.ResponseError("ERR unknown command"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_not_waited_for(err: redis.RedisError) -> None:
    with connect("redis://somewhere/0") as client, pytest.raises(type(err)):
        until_served(client, Away(err), None, lambda _: pytest.fail("it waited"))


def test_a_name_that_leads_nowhere_yet_is_looked_up_again(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up: Any = socket.getaddrinfo
    asked: list[str] = []

    def new_name(host: str, *args: Any, **kwargs: Any) -> Any:
        if host != "redis.example":
            return look_up(host, *args, **kwargs)
        asked.append(host)
        if len(asked) <= 4:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", new_name)
    with RedisServer(short_path, port=0) as server, connect(f"redis://redis.example:{server.port}/0") as client:
        assert until_served(client, client.ping, None, lambda _: None)


def test_a_worker_that_comes_before_its_redis_waits_and_then_works(short_path: Path, start: Start) -> None:  # noqa: F811
    server = RedisServer(short_path, port=free_port())
    worker = start(at=server.url)
    until(lambda: worker.log.read_text().count("waiting for Redis, next attempt in") >= 2)
    with server, EmbedQueue(server.url) as queue:
        assert len(queue.embed("text", timeout=30)) == 1
        assert worker.process.poll() is None
    assert all("Redis" in line for line in worker.log.read_text().splitlines()[:2])


def test_the_model_is_loaded_only_once_redis_serves(short_path: Path, start: Start) -> None:  # noqa: F811
    server = RedisServer(short_path, port=free_port())
    worker = start(at=server.url, program=slow_model(short_path, "python"))
    until(lambda: "waiting for Redis" in worker.log.read_text())
    assert "loading" not in worker.log.read_text()
    with server:
        until(lambda: "loading the model" in worker.log.read_text())


@pytest.mark.parametrize("fault", [fill_up, make_replica])
def test_registering_waits_for_a_redis_that_takes_no_writes(
    short_path: Path,
    start: Start,  # noqa: F811
    fault: Callable[[Any, bool], None],
) -> None:
    with RedisServer(short_path, port=0) as server, EmbedQueue(server.url) as queue:
        fault(queue._redis, True)
        worker = start("--name", "patient", at=server.url)
        until(lambda: worker.log.read_text().count("waiting for Redis") >= 2)
        fault(queue._redis, False)
        assert len(queue.embed("text", timeout=30)) == 1
        assert queue._redis.hget(keys.worker("patient"), "birth")
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 0, output
        assert workers(queue) == 0


def test_a_redis_that_reads_its_log_is_waited_for_by_worker_and_client(short_path: Path, start: Start) -> None:  # noqa: F811
    server = RedisServer(short_path, port=free_port(), durable=True)
    with server, EmbedQueue(server.url) as queue:
        queue.enqueue_many([f"text {number}" for number in range(2000)])
        queue._redis.bgrewriteaof()  # only what was written anew is read with a delay
        until(lambda: not queue._redis.info("persistence")["aof_rewrite_in_progress"])
    slowly = short_path / "slowly.conf"
    slowly.write_text("key-load-delay 3000\nloading-process-events-interval-bytes 1024\n")
    slow = RedisServer(short_path, port=server.port, durable=True, configuration=slowly)
    # Not by `start`, which returns when all is read.
    process = subprocess.Popen([slow.binary, *slow._arguments()], stdout=subprocess.DEVNULL)
    try:
        with EmbedQueue(server.url) as queue:
            until(lambda: _says_loading(queue))
            worker = start(at=server.url)
            until(lambda: "still loading its data" in worker.log.read_text())
            until(lambda: not _says_loading(queue), timeout_s=60)
            until(lambda: queue._redis.zcard(keys.finished("embed")) == 2000, timeout_s=60)
    finally:
        process.terminate()
        process.wait(20)


def _says_loading(queue: EmbedQueue) -> bool:
    try:
        queue.depth()
    except QueueConnectionError as err:
        return "still loading its data" in str(err)
    return False


@pytest.mark.parametrize(("timeout_s", "at_least_s"), [("0", 0.0), ("1.5", 1.5)])
def test_the_waiting_ends_with_its_timeout(start: Start, timeout_s: str, at_least_s: float) -> None:  # noqa: F811
    began_at = time.monotonic()
    status, output = start("--startup-timeout-s", timeout_s, at="redis://127.0.0.1:1/0").ended()
    assert status == 5
    *waiting, last = output.splitlines()
    assert last.startswith("error: no Redis at 127.0.0.1:1/0")
    assert bool(waiting) == bool(at_least_s)
    assert time.monotonic() - began_at >= at_least_s


# --- leaving


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_waiting_at_once(start: Start, number: signal.Signals, status: int) -> None:  # noqa: F811
    worker = start(at="redis://127.0.0.1:1/0")
    until(lambda: "waiting for Redis" in worker.log.read_text())
    asked_at = time.monotonic()
    worker.send(number)
    ended, output = worker.ended()
    assert ended == status, output
    assert time.monotonic() - asked_at < AT_ONCE_S
    assert "Traceback" not in output


@pytest.mark.parametrize("kind", SLOW_MODELS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_loading_of_a_model_at_once(
    url: str,
    short_path: Path,
    start: Start,  # noqa: F811
    kind: str,
    number: signal.Signals,
    status: int,
) -> None:
    worker = start(program=slow_model(short_path, kind))
    until(lambda: "loading the model" in worker.log.read_text())
    asked_at = time.monotonic()
    worker.send(number)
    ended, output = worker.ended()
    assert ended == status, output
    assert time.monotonic() - asked_at < AT_ONCE_S
    assert "Traceback" not in output


def test_process_1_of_a_container_leaves_while_it_starts(short_path: Path, start: Start, url: str) -> None:  # noqa: F811
    for at, command, sign in (
        ("redis://127.0.0.1:1/0", EMBEDQ, "waiting for Redis"),
        (url, slow_model(short_path, "library"), "loading the model"),
    ):
        worker = start(at=at, program=isolated(command))
        until(lambda shown=sign, log=worker.log: shown in log.read_text())  # type: ignore[misc]
        os.kill(isolated_pid(worker.process.pid), signal.SIGTERM)
        status, output = worker.ended(AT_ONCE_S)
        assert status == 143, output


def test_a_signal_between_two_attempts_to_register_leaves_nothing_behind(
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    with RedisServer(short_path, port=0) as server, EmbedQueue(server.url) as queue:
        job = queue.enqueue("text")
        make_replica(queue._redis, True)
        worker = start(at=server.url)
        until(lambda: "waiting for Redis" in worker.log.read_text())
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 143, output
        make_replica(queue._redis, False)
        assert workers(queue) == 0
        assert job.status() is JobStatus.QUEUED


def test_handlers_and_wakeup_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with startup.leaving_at_once():
        with startup.leaving_at_once(), pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is startup._leave
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
