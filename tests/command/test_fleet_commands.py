"""`embedq info|top|failed`, as an operator and as a script use them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from embedq.producer import EmbedQueue, JobStatus, QueueAccessError, failed, fleet, keys, quantities
from embedq.producer.connection import connect
from embedq.producer.fleet import FleetInfo, FleetReader, QueueInfo, WorkerInfo
from embedq.producer.rates import WINDOW_S, FleetRates, QueueRates
from embedq.producer.top import FailureCodes, FleetView
from embedq.producer.top_frame import Frame
from embedq.worker.cli import main
from embedq.worker.redis_server import RedisServer, free_port
from tests.conftest import until
from tests.queue.planted import plant_worker
from tests.queue.test_failed import plant_failed
from tests.queue.test_worker import EMBEDQ


def embedq(url: str, *arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=answer, env={"EMBEDQ_URL": url})


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with connect(url) as client:
        yield client


# --- info


def test_info_tells_what_waits_and_what_workers_make_of_it(client: Any, url: str) -> None:
    with EmbedQueue(url) as queue:
        queue.enqueue(["a", "b"])
    plant_worker(client, "w", tokens_per_s=10.0, recent_tokens_per_s=7.5, fill=0.25, busy=0.5, errors=3)
    plant_worker(client, "stock")
    client.hdel(keys.worker("stock"), "embedq_model")
    shown = embedq(url, "info").stdout
    for wanted in ("texts", "oldest", "backlog", "7.5", "25%", "50%", "bfloat16", "0.1.0", "(stock rq)"):
        assert wanted in shown
    told = json.loads(embedq(url, "info", "--json").stdout)
    [seen] = told["queues"]
    assert seen["texts"] == 2
    assert seen["backlog_s"] == pytest.approx(seen["tokens"] / 20)
    assert {worker["name"]: worker["figures"] and worker["figures"]["fill"] for worker in told["workers"]} == {
        "stock": None,
        "w": 0.25,
    }
    assert told["server"]["used_memory_bytes"] > 0


def test_an_endless_backlog_is_null_in_json_and_a_word_for_people(url: str) -> None:
    with EmbedQueue(url) as queue:
        queue.enqueue("a")
    assert json.loads(embedq(url, "info", "--json").stdout)["queues"][0]["backlog_s"] is None
    assert "endless" in embedq(url, "info").stdout


# --- failed


def test_failed_jobs_are_listed_for_people_and_for_scripts(client: Any, url: str) -> None:
    assert embedq(url, "failed", "list").stdout == "no failed jobs here\n"
    plant_failed(client, "a", ago_s=90, code="out_of_memory")
    plant_failed(client, "b", queue="urgent\x1b[2J", code="abandoned")
    shown = embedq(url, "failed", "list")
    assert shown.exit_code == 0
    assert "a  embed  out_of_memory  4 attempts, 9" in shown.stdout
    assert "    text 2: because of out_of_memory" in shown.stdout
    assert "\x1b" not in shown.stdout
    lines = [
        json.loads(line) for line in embedq(url, "failed", "list", "--json", "--code", "abandoned").stdout.splitlines()
    ]
    assert [(line["id"], line["code"], line["text_index"], line["attempts"]) for line in lines] == [
        ("b", "abandoned", 2, 4)
    ]
    assert embedq(url, "failed", "list", "--json", "--newer-than", "1m").stdout.count("\n") == 1
    assert embedq(url, "failed", "list", "--json", "--older-than", "1.5m", "--queue", "embed").stdout.count("\n") == 1
    assert "the first 1; --limit shows more" in embedq(url, "failed", "list", "--limit", "1").stdout


def test_one_failed_job_is_shown_whole_but_for_its_texts(client: Any, url: str) -> None:
    plant_failed(client, "a", data="a secret text", group_id="nightly")
    shown = embedq(url, "failed", "show", "a").stdout
    assert re.search(r"^group_id +nightly$", shown, re.MULTILINE)
    assert "because of encode_failed" in shown
    assert "secret" not in shown
    told = json.loads(embedq(url, "failed", "show", "a", "--json").stdout)
    assert (told["id"], told["group_id"], told["data_bytes"]) == ("a", "nightly", 13)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("show", "nobody"), 3, "error: there is no job nobody"),
        (("show", "waiting"), 1, "error: job waiting is queued"),
        (("show", "a b"), 2, "error: job id 'a b' does not do"),
        (("list", "--older-than", "soon"), 2, "'soon' is no duration, as 90, 15m, 2h or 7d are"),
        (("list", "--newer-than", "-5"), 2, "is no duration"),
        (("list", "--older-than", "2h", "--newer-than", "1h"), 2, "leave nothing"),
        (("list", "--queue", ""), 2, "error: the queue's name must be a string"),
        (("list", "--limit", "0"), 2, "error: Invalid value for '--limit'"),
        (("purge", "a", "--code", "x"), 2, "give job ids or options that choose jobs, not both"),
        (("requeue", "nobody"), 3, "error: there is no job nobody"),
        (("list", "--url", "redis://127.0.0.1:1"), 5, "error: no Redis at 127.0.0.1:1/0"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_status(
    url: str, arguments: tuple[str, ...], status: int, message: str
) -> None:
    with EmbedQueue(url) as queue:
        queue.enqueue("a", job_id="waiting")
    shown = embedq(url, "failed", *arguments)
    assert (shown.exit_code, shown.stdout) == (status, "")
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_several_jobs_are_put_back_once_somebody_agrees(client: Any, url: str) -> None:
    plant_failed(client, "a", "b", code="abandoned")
    plant_failed(client, "c")
    for answer in (None, "n\n"):
        refused = embedq(url, "failed", "requeue", "--code", "abandoned", answer=answer)
        assert refused.exit_code == 1
        assert "requeue 2 failed jobs?" in refused.stderr
        assert "nothing was done" in refused.stderr
    assert client.llen(keys.queue("embed")) == 0
    agreed = embedq(url, "failed", "requeue", "--code", "abandoned", answer="y\n")
    assert (agreed.exit_code, agreed.stdout) == (0, "2 requeued\n")
    assert embedq(url, "failed", "requeue", "--json").stdout == '{"requeued":1,"left":0}\n'  # a single one
    assert sorted(client.lrange(keys.queue("embed"), 0, -1)) == [b"a", b"b", b"c"]
    with EmbedQueue(url) as queue:
        assert queue.status("a") is JobStatus.QUEUED
    assert embedq(url, "failed", "requeue", "--yes").stdout == "0 requeued\n"


def test_jobs_are_purged_by_id_and_by_what_is_asked_for(client: Any, url: str) -> None:
    plant_failed(client, *(f"job-{place}" for place in range(250)), ago_s=100)
    plant_failed(client, "new", "newer")
    assert embedq(url, "failed", "purge", "job-0", "job-1").stdout == "2 purged\n"
    assert embedq(url, "failed", "purge", "--older-than", "50", "--limit", "8", "--yes").stdout == "8 purged\n"
    assert embedq(url, "failed", "purge", "--older-than", "50", "--yes").stdout == "240 purged\n"
    assert sorted(client.keys(keys.job("*"))) == [keys.job("new").encode(), keys.job("newer").encode()]


# --- top


def queue_info(name: str = "embed", **counts: Any) -> QueueInfo:
    zero: dict[str, Any] = dict.fromkeys(QueueInfo.__dataclass_fields__, 0)
    return QueueInfo(**{**zero, "name": name, "is_estimate": False, **counts})


def worker_info(name: str, queues: tuple[str, ...] = ("embed",), **told: Any) -> WorkerInfo:
    known: dict[str, Any] = {
        "state": "busy",
        "host": "box",
        "pid": 7,
        "model": "m",
        "device": "cpu",
        "jobs_done": 0,
        "jobs_failed": 0,
        "last_heartbeat": "",
        "silent_s": 0.0,
        "figures": None,
    }
    return WorkerInfo(name=name, queues=list(queues), **{**known, **told})


def test_rates_come_from_what_workers_have_done_and_from_what_is_left() -> None:
    rates = FleetRates()

    def look(second: float, queued: int, done: int, failed: int = 0) -> dict[str, QueueRates]:
        workers = [worker_info("w", jobs_done=done, jobs_failed=failed), worker_info("x", jobs_done=100)]
        return rates.add(FleetInfo([queue_info(queued=queued)], workers, False, None), second)

    assert look(0, 100, 0) == {}
    assert look(2, 90, 10, 10) == {"embed": QueueRates(enqueued=5.0, ended=10.0)}
    assert look(4, 0, 10, 10) == {"embed": QueueRates(enqueued=0.0, ended=5.0)}  # somebody has emptied it
    for second in (5, 6, 7, 8, 9, 30, 40):
        found = look(second, 0, 10, 10)
    assert found == {"embed": QueueRates(0.0, 0.0)}
    assert WINDOW_S == 10


def test_rates_of_queues_that_share_workers_come_from_what_is_kept() -> None:
    rates = FleetRates()
    workers = [worker_info("w", ("a", "b"), jobs_done=1000)]
    rates.add(FleetInfo([queue_info("a", finished=10), queue_info("b", finished=50)], workers, False, None), 0)
    now = [queue_info("a", finished=30, queued=10), queue_info("b", finished=20), queue_info("new")]
    assert rates.add(FleetInfo(now, workers, False, None), 10) == {
        "a": QueueRates(enqueued=3.0, ended=2.0),
        "b": QueueRates(0.0, 0.0),
    }


def picture(frame: Frame, width: int, height: int) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(frame, height=height)
    return capture.get()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (60, 12)])
def test_a_picture_fits_its_terminal_and_says_what_it_leaves_out(width: int, height: int) -> None:
    workers = [worker_info(f"worker-{number}.a-rather-long.name.example.com") for number in range(100)]
    workers.append(worker_info("zombie", state="lost", silent_s=100.0))
    queues = [queue_info(f"queue-{number}", queued=123_456, texts=9_876_543) for number in range(40)]
    queues.append(queue_info("stuck", queued=1, backlog_s=float("inf")))
    frame = Frame(
        "here", FleetInfo(queues, workers, True, fleet.ServerInfo(95, 100)), codes={"abandoned": 2}, error="no"
    )
    lines = picture(frame, width, height).splitlines()
    assert len(lines) <= max(height, 18)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for wanted in (
        "stuck",
        "endless",
        "zombie",
        "lost 100 s",
        "more queues",
        "more workers",
        "suspended",
        "no connection",
    ):
        assert wanted in text
    assert "10M" in text or "9.9M" in text
    assert ("scheduled" in text) == (width >= 110)


def test_numbers_in_a_narrow_terminal_are_whole_and_names_give_way() -> None:
    queues = [queue_info("a-queue-with-a-very-very-long-name", queued=99_999, texts=1_234_567, oldest_age_s=12.0)]
    text = picture(Frame("here", FleetInfo(queues, [worker_info("w")], False, None)), 80, 24)
    assert "99,999" in text
    assert "1.2M" in text
    assert "12 s" in text
    assert "a-queue-" in text


def test_what_anybody_wrote_into_redis_steers_no_terminal(client: Any, url: str) -> None:
    client.sadd(keys.QUEUES, keys.queue("\x1b[2J[red]q"))
    plant_worker(client, "\x1b]0;w\x07", state="\x1b[2J")
    plant_failed(client, "a", queue="\x1b[2J[red]q", code="abandoned")
    for arguments in (("info",), ("top", "--once", "--interval", "0.1"), ("failed", "list")):
        shown = embedq(url, *arguments)
        assert shown.exit_code == 0
        assert "\x1b" not in shown.stdout
        assert "[red]q" in shown.stdout


def test_one_picture_goes_into_a_pipe_with_rates_and_failures(client: Any, url: str) -> None:
    with EmbedQueue(url) as queue:
        queue.enqueue_many(["a", "b"])
    plant_failed(client, "x", "y", code="abandoned")
    plant_failed(client, "z", code="out_of_memory")
    plant_worker(client, "w", tokens_per_s=1000.0, recent_tokens_per_s=500.0)
    shown = embedq(url, "top", "--once", "--interval", "0.1").stdout
    assert "1 worker (1 busy)  500 tokens/s of 1,000" in shown
    assert "3 failed, of the last 3: abandoned 2, out_of_memory 1" in shown
    assert "in/s" in shown
    assert "canceled" in shown  # a pipe has room for everything


def test_failures_are_read_again_only_when_there_are_others(client: Any) -> None:
    plant_failed(client, "x", code="abandoned")
    codes, reader = FailureCodes(client), FleetReader(client)
    assert codes.count(reader.look()) == {"abandoned": 1}
    client.config_resetstat()
    assert codes.count(reader.look()) == {"abandoned": 1}
    assert "cmdstat_xrevrange" not in client.info("commandstats")
    plant_failed(client, "y")
    assert codes.count(reader.look()) == {"abandoned": 1, "encode_failed": 1}


def test_who_may_not_look_at_failed_jobs_is_shown_the_rest(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise QueueAccessError("no")

    plant_failed(client, "x")
    monkeypatch.setattr(failed, "latest", deny)
    view = FleetView(client)
    view.look()
    monkeypatch.setattr(failed, "latest", lambda *_: pytest.fail("it was asked again"))
    view.look()
    assert view.frame.codes is None
    assert "1 failed\n" in picture(view.frame, 80, 24)


def test_an_outage_is_shown_over_what_was_seen_last(short_path: Path) -> None:
    port = free_port()
    with connect(f"redis://127.0.0.1:{port}/0") as client:
        view = FleetView(client)
        view.try_to_look()
        assert "no connection: no Redis at" in picture(view.frame, 80, 24)
        with RedisServer(short_path, port=port):
            client.sadd(keys.QUEUES, keys.queue("embed"))
            view.try_to_look()
            assert "no connection" not in picture(view.frame, 80, 24)
        view.try_to_look()
        shown = picture(view.frame, 80, 24)
    assert "no connection" in shown
    assert "embed " in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_live_view_and_leaves_the_terminal_as_it_was(url: str, number: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    command = [*EMBEDQ, "top", "--url", url, "--interval", "0.2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""

    def read() -> None:
        nonlocal said
        try:
            said += os.read(ours, 65536)
        except OSError:  # the other end is closed
            time.sleep(0.01)

    try:
        until(lambda: read() or b"no worker is running" in said)
        process.send_signal(number)
        until(lambda: read() or process.poll() is not None)
        read()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == 0, said
    assert said.rfind(b"\x1b[?1049l") > said.rfind(b"\x1b[?1049h") >= 0  # the other screen, and back
    assert said.rfind(b"\x1b[?25h") > said.rfind(b"\x1b[?25l")  # the cursor
    assert b"Traceback" not in said


def test_credentials_that_are_refused_and_a_picture_without_redis_are_errors(url: str) -> None:
    shown = embedq("redis://127.0.0.1:1/0", "top", "--once")
    assert (shown.exit_code, shown.stdout) == (5, "")
    assert shown.stderr.splitlines()[-1].startswith("error: no Redis at 127.0.0.1:1/0")
    assert embedq(url, "top", "--interval", "0").exit_code == 2


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (quantities.count(0), "0"),
        (quantities.count(99_999), "99,999"),
        (quantities.count(123_456), "123k"),
        (quantities.count(1_234_567), "1.2M"),
        (quantities.count(123_456_789), "123M"),
        (quantities.count(2.5e9), "2.5G"),
        (quantities.rate(None), "-"),
        (quantities.rate(0), "0"),
        (quantities.rate(0.25), "0.2"),
        (quantities.rate(1234.5), "1,234"),
        (quantities.duration(None), "-"),
        (quantities.duration(0), "0 s"),
        (quantities.duration(0.04), "0.0 s"),
        (quantities.duration(9.96), "10 s"),
        (quantities.duration(119), "119 s"),
        (quantities.duration(121), "2 min"),
        (quantities.duration(7300), "2 h"),
        (quantities.duration(200_000), "2 d"),
        (quantities.duration(float("inf")), "endless"),
        (quantities.size(0), "0 B"),
        (quantities.size(2048), "2 KB"),
        (quantities.size(1.5 * 1024**3), "1.5 GB"),
        (quantities.size(3 * 1024**4), "3.0 TB"),
        (quantities.share(0.931), "93%"),
    ],
)
def test_quantities_are_short_and_have_a_unit(shown: str, wanted: str) -> None:
    assert shown == wanted
