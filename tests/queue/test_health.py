"""Probes: when a worker is live and ready, over HTTP that no client can block, and `embedq health`, which asks."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from embedq.model import NoopEncoder
from embedq.producer import ConfigurationError, EmbedQueue, keys
from embedq.producer import http_endpoints as endpoints
from embedq.producer.connection import connect
from embedq.producer.http_endpoints import Answer, HttpEndpoints, Page
from embedq.worker import WorkerSettings
from embedq.worker.health_command import health as health_command
from embedq.worker.redis_server import RedisServer
from embedq.worker.telemetry.health import MAX_STEP_S, Health
from tests.conftest import until
from tests.queue.test_worker import Start, start
from tests.queue.watched_worker import WatchedWorker, watched

__all__ = ["start"]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pass_time(health: Health, clock: Clock, seconds: float, num_held: int) -> None:
    for _ in range(int(seconds)):
        clock.now += 1.0
        health.tick(num_held)


# --- the judgement


def test_work_in_hand_that_does_not_move_is_not_live(clock: Clock) -> None:
    health = Health(10, 60, clock)
    pass_time(health, clock, 100, 0)
    assert health.why_not_live() is None
    pass_time(health, clock, 10, 1)
    assert health.why_not_live() is None
    pass_time(health, clock, 1, 1)
    assert health.why_not_live() == "jobs in hand have not moved for 11 s"
    health.published([], 0.1)
    pass_time(health, clock, 1, 1)
    assert health.why_not_live() is None


def test_a_long_job_lives_as_long_as_its_texts_are_encoded(clock: Clock) -> None:
    health = Health(10, 60, clock)
    for _ in range(10):
        pass_time(health, clock, 8, 1)
        health.tokenized(0.1)
        pass_time(health, clock, 1, 1)
    assert health.why_not_live() is None


def test_results_that_wait_for_redis_are_no_reason_for_a_restart(clock: Clock) -> None:
    health = Health(10, 60, clock)
    for _ in range(20):
        pass_time(health, clock, 4, 5)
        health.kept_waiting()
    assert health.why_not_live() is None


def test_a_process_that_stood_still_has_not_hung(clock: Clock) -> None:
    health = Health(10, 60, clock)
    pass_time(health, clock, 1, 1)
    clock.now += 3600
    health.tick(1)
    assert health.why_not_live() is None
    assert health._stalled_s <= 1 + MAX_STEP_S


def test_a_thread_that_has_ended_is_not_live(clock: Clock) -> None:
    health = Health(10, 60, clock)
    health.dead_threads = lambda: ["embedq-publish"]
    assert health.why_not_live() == "threads have ended: embedq-publish"


def test_ready_is_who_has_begun_hears_redis_and_is_neither_suspended_nor_stopping(clock: Clock) -> None:
    health = Health(10, 60, clock)
    assert health.why_not_ready() == "starting"
    health.begin()
    assert health.why_not_ready() == "Redis has not answered yet"
    health.last_contact = lambda: 1000.0
    assert health.why_not_ready() is None
    health.is_suspended = True
    assert health.why_not_ready() == "suspended"
    health.is_suspended = False
    clock.now += 61
    assert health.why_not_ready() == "Redis has not answered for 61 s"
    clock.now -= 61
    health.end()
    assert health.why_not_ready() == "stopping"
    health.begin()
    assert health.why_not_ready() == "stopping"


# --- a worker's


def test_a_worker_whose_model_loads_is_live_and_not_ready(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Event()

    def load(_settings: WorkerSettings) -> NoopEncoder:
        loaded.wait(30)
        return NoopEncoder(8)

    monkeypatch.setattr("embedq.worker.worker.load_encoder", load)
    with WatchedWorker(url) as worker:
        assert worker.ask("/livez") == (200, "ok\n")
        assert worker.ask("/readyz") == (503, "starting\n")
        assert worker.value("embedq_ready") == 0
        assert worker.value("embedq_held_jobs") == 0
        loaded.set()
        until(worker.is_ready)


def test_a_suspended_worker_is_not_ready_until_it_goes_on(url: str, queue: EmbedQueue) -> None:
    with watched(url) as worker:
        queue._redis.set(keys.SUSPENDED, 1)
        until(lambda: worker.ask("/readyz") == (503, "suspended\n"))
        assert worker.ask("/livez") == (200, "ok\n")
        queue._redis.delete(keys.SUSPENDED)
        until(worker.is_ready)


def test_a_worker_that_ends_is_not_ready(url: str, queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, gate = threading.Event(), threading.Event()

    def wait(self: NoopEncoder, batch: object) -> object:
        at_work.set()
        gate.wait(30)
        return encode(self, batch)  # type: ignore[arg-type]

    encode = NoopEncoder.encode_tokens
    monkeypatch.setattr(NoopEncoder, "encode_tokens", wait)
    with watched(url) as worker:
        queue.enqueue("the last one")
        assert at_work.wait(20)
        worker.worker._end_orderly()
        assert worker.ask("/readyz") == (503, "stopping\n")
        assert worker.ask("/livez") == (200, "ok\n")
        gate.set()


def test_a_worker_whose_encoder_hangs_turns_red(url: str, queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(NoopEncoder, "encode_tokens", lambda _self, _batch: gate.wait(60))
    with watched(url, liveness_timeout_s=1) as worker:
        queue.enqueue("hangs")
        until(lambda: worker.ask("/livez")[0] == 503)
        assert worker.ask("/livez")[1].startswith("jobs in hand have not moved for ")
        assert worker.value("embedq_live") == 0
        worker.worker.departure.at_once = lambda *_: None  # type: ignore[method-assign,assignment,return-value]
        monkeypatch.undo()
        gate.set()


def test_a_worker_without_redis_lives_and_is_not_ready(short_path: Path) -> None:
    with RedisServer(short_path) as server, watched(server.url, lease_s=1, liveness_timeout_s=1) as worker:
        with connect(server.url) as client:
            client.shutdown(nosave=True)
        until(lambda: worker.ask("/readyz")[1].startswith("Redis has not answered for "))
        assert worker.ask("/livez") == (200, "ok\n")
        assert worker.value("embedq_redis_errors_total", error="ConnectionError") > 0


def test_a_thread_of_the_pipeline_that_ends_turns_it_red(url: str) -> None:
    with watched(url) as worker:
        pipeline = worker.worker.pipeline
        with pipeline._lock:  # nobody sees both but the thread itself
            pipeline._is_stopping = True
            pipeline._to_encode.notify_all()
        until(lambda: not next(t for t in pipeline._threads if t.name == "embedq-encode").is_alive())
        pipeline._is_stopping = False
        status, said = worker.ask("/livez")
        assert status == 503
        assert "embedq-encode" in said.removeprefix("threads have ended: ")


def test_a_port_that_is_taken_is_said_before_anything_else(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = start("--metrics-port", port, at="redis://127.0.0.1:1/0").ended()
    assert status == 2
    assert said.strip().splitlines()[-1] == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another"
    )


def test_a_worker_that_waits_for_redis_at_its_start_is_live(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start("--metrics-port", str(port), at="redis://127.0.0.1:1/0")
    runner = CliRunner()
    until(lambda: runner.invoke(health_command, ["--port", str(port)]).exit_code == 0)
    shown = runner.invoke(health_command, ["--port", str(port), "--ready"])
    assert (shown.exit_code, shown.output) == (1, "starting\n")


def test_settings_of_probes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"metrics_port": 65_536}, {"metrics_port": -1}, {"metrics_host": ""}, {"liveness_timeout_s": 0.5}):
        with pytest.raises(ConfigurationError):
            WorkerSettings(**settings)  # type: ignore[arg-type]
    monkeypatch.setenv("EMBEDQ_METRICS_PORT", "0")
    monkeypatch.setenv("EMBEDQ_METRICS_HOST", "0.0.0.0")
    monkeypatch.setenv("EMBEDQ_LIVENESS_TIMEOUT_S", "5")
    settings = WorkerSettings.from_environment()
    assert (settings.metrics_port, settings.metrics_host, settings.liveness_timeout_s) == (0, "0.0.0.0", 5.0)


# --- HTTP


@pytest.fixture
def pages() -> Iterator[HttpEndpoints]:
    gate = threading.Event()

    def hang(_accept: str) -> Answer:
        gate.wait(30)
        return Answer(200, b"late\n")

    def fail(_accept: str) -> Answer:
        raise RuntimeError("secret")

    served = HttpEndpoints(
        "127.0.0.1",
        0,
        {
            "/livez": Page(lambda accept: Answer(200, f"ok {accept}\n".encode())),
            "/large": Page(lambda _: Answer(200, b"x" * 10_000_000)),
            "/fails": Page(fail),
            "/hangs": Page(hang, is_slow=True),
        },
    )
    served.start()
    yield served
    gate.set()
    served.close()


def fetch(served: HttpEndpoints, method: str, path: str, accept: str = "") -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(served.host, served.port, timeout=20)
    try:
        connection.request(method, path, headers={"Accept": accept})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_only_get_and_head_of_known_paths_are_answered(pages: HttpEndpoints) -> None:
    assert fetch(pages, "GET", "/livez", "text/html")[:2] == (200, b"ok text/html\n")
    assert fetch(pages, "GET", "/livez?verbose=1")[0] == 200
    status, body, headers = fetch(pages, "HEAD", "/livez")
    assert (status, body, headers["Content-Length"]) == (200, b"", "4")
    assert headers["Connection"] == "close"
    assert fetch(pages, "GET", "/")[0] == fetch(pages, "GET", "/livez/../fails")[0] == 404
    status, _, headers = fetch(pages, "POST", "/livez")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_page_that_fails_tells_nothing(pages: HttpEndpoints) -> None:
    assert fetch(pages, "GET", "/fails")[:2] == (500, b"internal server error\n")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /livez SPDY/3\r\n\r\n", b"400"),
        (b"\x00\xff \x80 HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request_gets_an_error(pages: HttpEndpoints, sent: bytes, status: bytes) -> None:
    with socket.create_connection((pages.host, pages.port), timeout=20) as client:
        client.sendall(sent)
        assert client.recv(1000).split()[1] == status
    assert fetch(pages, "GET", "/livez")[0] == 200


def test_clients_that_send_or_read_nothing_hold_up_nobody(
    pages: HttpEndpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "CLIENT_TIMEOUT_S", 1.0)
    silent = [socket.create_connection((pages.host, pages.port), timeout=20) for _ in range(200)]
    try:
        for client in silent[:20]:
            client.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        for client in silent[20:40]:
            client.sendall(b"GET /li")
        assert fetch(pages, "GET", "/livez")[0] == 200
        # Each is cut off in its time.
        until(lambda: not pages._tasks)
        assert silent[-1].recv(10) == b""
    finally:
        for client in silent:
            client.close()


def test_a_page_that_hangs_holds_up_itself_alone(pages: HttpEndpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "CLIENT_TIMEOUT_S", 0.5)
    for _ in range(3):
        with pytest.raises((http.client.HTTPException, OSError)):
            fetch(pages, "GET", "/hangs")
        break
    assert fetch(pages, "GET", "/livez")[0] == 200
    # It still hangs, and is not begun again.
    assert fetch(pages, "GET", "/hangs")[0] == 503
    assert sum(thread.name == "embedq-http-page" for thread in threading.enumerate()) == 1


def test_what_was_never_started_is_closed_all_the_same() -> None:
    served = HttpEndpoints("127.0.0.1", 0, {})
    served.close()
    with socket.create_server(("127.0.0.1", served.port)):
        pass


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1 port 9465: .+; choose another"):
        HttpEndpoints("192.0.2.1", 9465, {})


# --- embedq health


def test_the_command_says_how_a_worker_is(url: str, queue: EmbedQueue) -> None:
    with watched(url) as worker:
        port = str(worker.worker.monitor.port)
        runner = CliRunner()
        assert runner.invoke(health_command, ["--port", port]).output == "ok\n"
        queue._redis.set(keys.SUSPENDED, 1)
        until(lambda: worker.ask("/readyz")[0] == 503)
        found = runner.invoke(health_command, ["--ready"], env={"EMBEDQ_METRICS_PORT": port})
        assert (found.exit_code, found.output) == (1, "suspended\n")


def test_the_command_fails_in_a_line_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        found = CliRunner().invoke(health_command, ["--port", port, "--timeout", "0.2"])
        assert (found.exit_code, found.output) == (1, f"no answer from 127.0.0.1 port {port}: timed out\n")
    found = CliRunner().invoke(health_command, ["--port", port])
    assert found.exit_code == 1
    assert "Connection refused" in found.output


def test_the_command_starts_without_the_others_libraries() -> None:
    code = (
        "import sys; sys.argv = ['embedq', 'health', '--port', '1']\n"
        "from embedq.worker.entry import main\n"
        "try: main()\n"
        "except SystemExit as err: status = err.code\n"
        "print(status, [name for name in ('redis', 'rq', 'numpy', 'rich', 'embedq.producer') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "1 []"


def test_the_other_commands_are_where_they_were() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "embedq.worker.entry", "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0
    assert "health" in shown.stdout
    assert "worker" in shown.stdout


# --- a socket that the supervisor has made


def test_a_worker_serves_on_a_socket_that_it_is_given(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, given = listening.getsockname()[1], os.dup(listening.fileno())
    with watched(url, metrics_port=1, metrics_fd=given) as worker:
        assert worker.worker.monitor.port == port
        assert worker.value("embedq_ready") == 1


def test_probes_on_a_given_socket_need_no_library(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedq.worker.telemetry.metrics", None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        given = os.dup(listening.fileno())
    with watched(url, metrics_port=None, metrics_fd=given) as worker:
        assert worker.ask("/livez") == (200, "ok\n")
        assert worker.ask("/metrics")[0] == 404


def test_a_descriptor_that_is_no_socket_which_listens_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(ConfigurationError, match=r"is no socket$"):
        endpoints.inherited(file.fileno())
    with socket.socket() as idle, pytest.raises(ConfigurationError, match="is no socket that listens"):
        endpoints.inherited(idle.fileno())
