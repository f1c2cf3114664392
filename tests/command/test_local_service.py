"""The embedded Redis, `embedq up` and `embedq demo`: they work, they clean up, whichever way they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from embedq.producer import ConfigurationError, EmbedQueue
from embedq.worker import WorkerSettings, cli, processes, redis_server
from embedq.worker.redis_server import RedisServer, free_port
from embedq.worker.supervision.invocation import worker_command
from tests.conftest import until

EMBEDQ = [sys.executable, "-m", "embedq.worker.cli"]
Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def run(short_path: Path) -> Iterator[Run]:
    """Starts `embedq ...` with homes of its own; kills what a failed test has left."""
    running: list[subprocess.Popen[str]] = []
    home = {"HOME": str(short_path), "XDG_DATA_HOME": str(short_path), "TMPDIR": str(short_path)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*EMBEDQ, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **home},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def children_of(folder: Path) -> list[int]:
    """Processes that have to do with this test's folder: by command line, environment, working folder or open files.

    A process that has given itself another title shows neither command line nor environment.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                told += b"".join(bytes(link.readlink()) for link in (entry / "cwd", *(entry / "fd").iterdir()))
            except OSError:
                continue
            if bytes(folder) in told:
                found.append(int(entry.name))
    return found


def gone(folder: Path, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while children_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def read_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        pytest.fail(f"it ended: {process.communicate(timeout=20)}")
    return line


# --- the server


def test_a_server_lives_in_its_folder_and_ends_with_the_block(short_path: Path) -> None:
    with RedisServer(short_path) as server:
        assert server.url == f"unix://{short_path}/redis.sock"
        with EmbedQueue(server.url) as queue:
            assert queue.depth() == 0
        assert children_of(short_path) == [server.pid]
    assert children_of(short_path) == []
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid


def test_durable_data_is_there_after_a_restart(short_path: Path) -> None:
    with RedisServer(short_path, port=0, durable=True) as server, EmbedQueue(server.url) as queue:
        job = queue.enqueue("text")
    with RedisServer(short_path, port=0, durable=True) as server, EmbedQueue(server.url) as queue:
        assert queue.status(job.id) == "queued"


def test_a_server_that_cannot_start_says_why(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="port 6379 is left to your own Redis"):
        RedisServer(short_path, port=6379)
    with RedisServer(short_path, port=0) as server:
        other = RedisServer(short_path / "other", port=server.port)
        with pytest.raises(ConfigurationError, match="is taken; choose another with --port"):
            other.start()
    with pytest.raises(ConfigurationError, match="too long for a unix socket"):
        RedisServer(short_path / ("x" * 100)).start()
    with pytest.raises(ConfigurationError, match="/bin/false ended with status 1"):
        RedisServer(short_path, binary="/bin/false").start()
    monkeypatch.setattr(redis_server.shutil, "which", lambda _name: None)
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match="no redis-server is installed: pip install"):
        RedisServer(short_path)


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(short_path: Path) -> None:
    log = short_path / "log"
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = processes.start([sys.executable, "-c", code], log)
    while "up" not in processes.last_lines(log):
        time.sleep(0.02)
    assert processes.stop(process, grace_s=0.2) == -signal.SIGKILL
    assert processes.stop(process, grace_s=0.2) == -signal.SIGKILL
    assert processes.last_lines(short_path / "none") == "(no output)"


# --- up


def test_every_setting_reaches_the_worker_as_the_flag_it_is() -> None:
    settings = WorkerSettings(
        model="noop:8", warm_up=False, allow_tf32=True, lease_s=5.0, allow_callbacks=("a.b", "c.d")
    )
    command = worker_command(["embed"], settings, ["--name", "w"])
    parsed = cli.worker.make_context("worker", command[command.index("worker") + 1 :]).params
    assert WorkerSettings(**{field.name: parsed[field.name] for field in fields(WorkerSettings)}) == settings


def test_up_serves_and_keeps_its_data(run: Run, short_path: Path) -> None:
    port = str(free_port())
    results = []
    for _ in range(2):
        service = run("up", "--model", "noop:8", "--port", port)
        with EmbedQueue(read_url(service)) as queue:
            job = queue.enqueue("text", job_id="kept")
            results.append(job.result(timeout=20).timings.total_s)
        service.send_signal(signal.SIGINT)
        _, errors = service.communicate(timeout=30)
        assert service.returncode == 0, errors
        assert f"export EMBEDQ_URL=redis://127.0.0.1:{port}/0" in errors
        assert "the data stays in" in errors
        assert gone(short_path)
    assert results[0] == results[1]  # the same job's result, not a new one


def test_a_second_up_in_the_same_folder_is_refused(run: Run, short_path: Path) -> None:
    first = run("up", "--model", "noop:8", "--port", "0")
    read_url(first)
    second = run("up", "--model", "noop:8", "--port", "0")
    _, errors = second.communicate(timeout=20)
    assert second.returncode == 1
    assert errors.startswith("error: another `embedq up` runs in")
    first.terminate()
    first.communicate(timeout=30)
    assert first.returncode == 0
    assert gone(short_path)


def child(process: subprocess.Popen[str], what: str) -> int:
    """The number of the child with this in its title; 0 if there is none."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if what in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
    return 0


def test_up_ends_and_says_so_if_its_redis_dies(run: Run, short_path: Path) -> None:
    service = run("up", "--model", "noop:8", "--port", "0")
    read_url(service)
    worker = child(service, "embedq worker")
    os.kill(child(service, "redis-server"), signal.SIGKILL)
    _, errors = service.communicate(timeout=60)
    assert service.returncode == 2
    assert "ended with status" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert gone(short_path)
    assert not Path(f"/proc/{worker}").exists()


def test_up_replaces_its_worker_if_that_dies(run: Run, short_path: Path) -> None:
    service = run("up", "--model", "noop:8", "--port", "0")
    with EmbedQueue(read_url(service)) as queue:
        first = child(service, "embedq worker")
        os.kill(first, signal.SIGKILL)
        assert queue.embed("text", timeout=60).vectors.shape == (1, 8)
        assert child(service, "embedq worker") not in (0, first)
    service.send_signal(signal.SIGTERM)
    _, errors = service.communicate(timeout=60)
    assert service.returncode == 0
    assert "ended with SIGKILL; next start in" in errors
    assert gone(short_path)


def test_up_with_a_model_that_is_not_there_starts_nothing(run: Run, short_path: Path) -> None:
    _, errors = run("up", "--model", "./nowhere", "--port", "0").communicate(timeout=30)
    assert errors.startswith("error: there is no folder")
    assert gone(short_path)


def test_not_even_kill_leaves_a_process_behind(run: Run, short_path: Path) -> None:
    service = run("up", "--model", "noop:8", "--port", "0")
    read_url(service)
    worker = child(service, "embedq worker")
    assert set(children_of(short_path)) >= {service.pid, child(service, "redis-server")}
    service.kill()
    service.wait(10)
    assert gone(short_path)
    until(lambda: not Path(f"/proc/{worker}").exists())


# --- demo


def test_demo_shows_neighbours_a_job_speed_and_what_next(run: Run, short_path: Path) -> None:
    output, errors = run("demo", "--model", "noop:64").communicate(timeout=60)
    assert errors == ""
    for wanted in ("400/400", "cosine", "One job by its id", "texts/s", "embedq up", "knows no language"):
        assert wanted in output
    assert gone(short_path)
    assert [path.name for path in short_path.glob("embedq-*")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process(run: Run, short_path: Path, number: signal.Signals) -> None:
    process = run("demo", "--model", "noop:64")
    while len(children_of(short_path)) < 2:  # Redis and the worker
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    assert gone(short_path)


def test_a_demo_whose_worker_cannot_start_says_why(run: Run, short_path: Path) -> None:
    process = run("demo", "--model", "noop:64", "--device", "cpu", "--max-batch-tokens", "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.strip() == "error: max_batch_tokens must be 1 or more, not 0"
    assert gone(short_path)
