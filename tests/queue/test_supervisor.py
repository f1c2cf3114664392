"""`embedq worker --processes`: real processes that are killed, stopped, hung and signalled, and one port for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_metrics

from embedq.producer import EmbedQueue, JobStatus
from embedq.worker.redis_server import RedisServer, free_port
from embedq.worker.supervision.probe import fetch
from tests.conftest import until
from tests.queue.test_shutdown import slow_device
from tests.queue.test_worker import EMBEDQ, RunningWorker, Start, finished, start, workers  # noqa: F401
from tests.queue.worker_programs import isolated, isolated_pid, program, signal_isolated

#: Seconds that a busy machine may take for what takes one.
PATIENCE_S = 60.0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def num_ready(port: int) -> int:
    """Processes that the supervisor's /readyz calls ready; 0 while it does not answer."""
    try:
        return fetch(port, "/readyz").body.count(": ready")
    except OSError:
        return 0


def supervised(start: Start, *arguments: str, **keywords: object) -> tuple[RunningWorker, int]:  # noqa: F811
    """Two processes, both ready, and the supervisor's port."""
    port = free_port()
    running = start("--processes", "2", "--metrics-port", str(port), *arguments, **keywords)
    until(lambda: num_ready(port) == 2, PATIENCE_S)
    return running, port


def test_a_process_that_is_killed_is_replaced(start: Start) -> None:  # noqa: F811
    running, port = supervised(start)
    first, second = children(running.process.pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: children(running.process.pid)[-1] not in (first, second), PATIENCE_S)
    until(lambda: num_ready(port) == 2, PATIENCE_S)
    assert second in children(running.process.pid)
    page = fetch(port, "/metrics").body
    assert 'embedq_supervisor_restarts_total{process="0",reason="exit"} 1' in page
    assert "ended with SIGKILL; next start in" in running.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_ends_all_and_gives_the_jobs_back(
    queue: EmbedQueue,
    short_path: Path,
    start: Start,  # noqa: F811
    number: signal.Signals,
) -> None:
    running, _ = supervised(start, "--max-batch-tokens", "12", program=slow_program(short_path))
    jobs = queue.enqueue_many(["one two three four"] * 40)
    until(lambda: running.log.read_text().count("on the device") >= 2)
    pids = children(running.process.pid)
    running.send(number)
    status, output = running.ended(PATIENCE_S)
    assert status == 0, output
    assert "Traceback" not in output
    # Each gives its own back in order; what they had lay among each other.
    statuses = list(queue.statuses(job.id for job in jobs).values())
    assert set(statuses) == {JobStatus.FINISHED, JobStatus.QUEUED}
    assert queue.depth() == statuses.count(JobStatus.QUEUED)
    assert workers(queue) == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def slow_program(folder: Path) -> list[str]:
    """Its children are the same program."""
    script = slow_device(folder, 1)
    return program(
        folder,
        "import sys\nfrom embedq.worker.supervision import supervise\n"
        f"supervise.EMBEDQ = (sys.executable, {script[1]!r})\n"
        + Path(script[1]).read_text().partition("from embedq.worker.cli")[0],
    )


def test_a_process_that_stands_still_is_killed_and_replaced(start: Start) -> None:  # noqa: F811
    running, port = supervised(start, "--hang-timeout-s", "5")
    stopped, other = children(running.process.pid)
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: stopped not in children(running.process.pid), PATIENCE_S)
    until(lambda: num_ready(port) == 2, PATIENCE_S)
    assert other in children(running.process.pid)
    assert 'embedq_supervisor_restarts_total{process="0",reason="hung"} 1' in fetch(port, "/metrics").body
    assert "hangs: no answer for" in running.log.read_text()


def test_sighup_replaces_all_and_no_moment_is_without_a_process(start: Start) -> None:  # noqa: F811
    running, port = supervised(start)
    before = set(children(running.process.pid))
    running.send(signal.SIGHUP)
    lowest = 2
    deadline = time.monotonic() + PATIENCE_S
    while not before.isdisjoint(children(running.process.pid)):
        lowest = min(lowest, num_ready(port))
        assert time.monotonic() < deadline, running.log.read_text()
        time.sleep(0.05)
    until(lambda: num_ready(port) == 2, PATIENCE_S)
    assert lowest >= 1
    until(lambda: "the rolling restart is done" in running.log.read_text(), PATIENCE_S)


def test_a_redis_that_is_away_at_the_start_is_waited_for_and_is_no_hang(
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    port = free_port()
    server = RedisServer(short_path)
    running = start("--processes", "1", "--metrics-port", str(port), at=server.url)
    until(lambda: "waiting for Redis" in running.log.read_text(), PATIENCE_S)
    until(lambda: "process 0 on auto: starting: starting" in fetch(port, "/readyz").body, PATIENCE_S)
    assert (fetch(port, "/livez").status, fetch(port, "/readyz").status) == (200, 503)
    with server:
        until(lambda: num_ready(port) == 1, PATIENCE_S)
    running.send(signal.SIGTERM)
    running.ended(PATIENCE_S)


def test_burst_ends_with_0_when_all_have_done_their_part(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    jobs = queue.enqueue_many(map(str, range(50)))
    status, output = start("--processes", "2", "--burst").ended(PATIENCE_S)
    assert status == 0, output
    assert finished(queue) == len(jobs)
    assert output.count("is done") == 2


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--model", "./nowhere"], 6, "there is no folder"),
        (["--device", "cuda:all"], 2, "there is no CUDA device: "),
        (["--processes", "2", "--name", "x", "--lease-s", "0"], 2, "lease_s must be"),
    ],
)
def test_what_cannot_work_ends_with_one_line_that_says_so(
    start: Start,  # noqa: F811
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    ended_with, output = start("--processes", "2", *arguments).ended(PATIENCE_S)
    assert ended_with == status, output
    assert says in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("error: ")


def test_wrong_credentials_end_it_at_once(url: str, start: Start) -> None:  # noqa: F811
    with EmbedQueue(url) as client:
        client._redis.config_set("requirepass", "secret")
        try:
            status, output = start("--processes", "2").ended(PATIENCE_S)
        finally:
            client._redis.config_set("requirepass", "")
    assert status == 5, output
    assert output.count("is given up") == 2


def test_process_1_of_a_container_ends_all_and_takes_note_of_strangers(
    queue: EmbedQueue,
    start: Start,  # noqa: F811
) -> None:
    running = start("--processes", "2", program=isolated(EMBEDQ))
    until(lambda: workers(queue) == 2, PATIENCE_S)
    job = queue.enqueue("text")
    assert job.result(timeout=PATIENCE_S).vectors.shape == (1, 8)
    signal_isolated(running.process.pid, signal.SIGTERM)
    status, output = running.ended(PATIENCE_S)
    assert status == 0, output
    assert workers(queue) == 0


def test_a_process_left_to_process_1_becomes_no_zombie(start: Start, queue: EmbedQueue) -> None:  # noqa: F811
    running = start("--processes", "1", program=isolated(EMBEDQ))
    until(lambda: workers(queue) == 1, PATIENCE_S)
    inner = isolated_pid(running.process.pid)
    enter = ["nsenter", "--target", str(inner), "--pid", "--mount"]
    if subprocess.run([*enter, "true"], capture_output=True).returncode != 0:
        pytest.skip("no namespace may be entered here")
    # The shell ends at once and leaves its child behind.
    subprocess.run([*enter, "sh", "-c", "sleep 0.1 & exit 0"], check=True)
    time.sleep(0.5)
    until(lambda: [is_zombie(pid) for pid in children(inner)] == [False])


def is_zombie(pid: int) -> bool:
    return " Z " in Path(f"/proc/{pid}/stat").read_text()


def is_running(pid: int) -> bool:
    """Not one that has ended and waits for the system's process 1 to take note."""
    try:
        return not is_zombie(pid)
    except OSError:
        return False


def test_a_killed_supervisor_takes_its_processes_along(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    running, _ = supervised(start)
    pids = children(running.process.pid)
    running.send(signal.SIGKILL)
    # In order: they unregister.
    until(lambda: workers(queue) == 0, PATIENCE_S)
    until(lambda: not [pid for pid in pids if is_running(pid)], PATIENCE_S)


def test_one_port_shows_all_processes(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    jobs = queue.enqueue_many(map(str, range(10)))
    running, port = supervised(start)
    until(lambda: finished(queue) == len(jobs))
    assert queue.statuses(job.id for job in jobs)[jobs[0].id] is JobStatus.FINISHED
    assert fetch(port, "/livez").status == 200
    ready = fetch(port, "/readyz")
    assert ready.body.splitlines()[0] == "2 of 2 processes ready"
    readers: list[tuple[str, Callable[..., object]]] = [
        ("", read_metrics),
        ("application/openmetrics-text", read_openmetrics),
    ]
    for accept, read in readers:
        families = {family.name: family for family in read(fetch(port, "/metrics", accept=accept).body)}  # type: ignore[attr-defined]
        texts = [sample for sample in families["embedq_texts"].samples if sample.name == "embedq_texts_total"]
        assert {sample.labels["process"] for sample in texts} == {"0", "1"}
        assert sum([sample.value for sample in texts]) == 10
        running_now = {s.labels["state"]: s.value for s in families["embedq_supervisor_processes"].samples}
        assert running_now == {"starting": 0, "running": 2, "backing_off": 0, "given_up": 0}
    stopped = children(running.process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    page = fetch(port, "/metrics", timeout_s=30).body
    os.kill(stopped, signal.SIGCONT)
    assert 'embedq_texts_total{process="0"' in page
    assert 'embedq_texts_total{process="1"' not in page
    assert 'embedq_supervisor_unanswered_scrapes_total{process="1"} 1' in page


def test_json_lines_stay_json_and_tell_their_process(start: Start) -> None:  # noqa: F811
    running, _ = supervised(start, "--log-format", "json")
    running.send(signal.SIGTERM)
    _, output = running.ended(PATIENCE_S)
    lines = [orjson.loads(line) for line in output.splitlines()]
    assert {line.get("process") for line in lines} == {None, 0, 1}
    assert all(line["message"] for line in lines)


def test_a_supervisor_loads_neither_torch_nor_the_worker() -> None:
    code = (
        "import sys, embedq.worker.cli, embedq.worker.supervision.supervise\n"
        "print([name for name in ('torch', 'tokenizers', 'embedq.worker.worker', 'prometheus_client')"
        " if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"
