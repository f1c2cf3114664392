"""`embedq enqueue|embed|status|result|cancel|requeue|info`, as a person and as a script use them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from embedq.producer import EmbedQueue, JobStatus, QueueConnectionError, calls, formats, keys, wire
from embedq.worker.cli import main
from tests.conftest import Drain, until


class Shell:
    """Runs `embedq ...` in this process with EMBEDQ_URL set."""

    def __init__(self, url: str) -> None:
        self.environment = {"EMBEDQ_URL": url}

    def __call__(self, *arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=stdin, env=self.environment)


@pytest.fixture
def embedq(url: str) -> Shell:
    return Shell(url)


def one_line(result: Result) -> str:
    """The single line of an error, after log lines at most; neither a traceback nor anything on stdout."""
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_text_goes_through_by_job_id(embedq: Shell, drain: Drain) -> None:
    shown = embedq("enqueue", "a text", "another")
    assert shown.exit_code == 0
    first, second = shown.stdout.split()
    assert embedq("status", first, second).stdout == f"{first}  queued\n{second}  queued\n"
    drain()
    assert json.loads(embedq("status", first, "--json").stdout) == {"id": first, "status": "finished"}
    summary = embedq("result", first).stdout
    assert "1 x 8 float32 by noop:8" in summary


def test_texts_come_from_arguments_a_file_or_stdin(embedq: Shell, queue: EmbedQueue, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("eins\r\n\nzwei ü\n", encoding="utf-8")
    assert len(embedq("enqueue", "--file", str(lines)).stdout.split()) == 2
    assert len(embedq("enqueue", "-f", "-", stdin="a\nb\nc\n").stdout.split()) == 3
    ids = embedq("enqueue", "--one-job", "--job-id", "mine", "--json", stdin="a\nb\n").stdout
    assert json.loads(ids) == {"id": "mine"}
    assert queue.depth() == 6


@pytest.mark.parametrize("file_format", formats.FILE_FORMATS)
def test_every_format_holds_the_same_numbers(
    embedq: Shell, queue: EmbedQueue, drain: Drain, tmp_path: Path, file_format: str
) -> None:
    job = queue.enqueue(["a", "b"])
    drain()
    wanted = job.result().vectors
    file = tmp_path / f"vectors.{file_format}"
    shown = embedq("result", job.id, "--format", file_format, "--output", str(file))
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "2 x 8 float32" in shown.stderr
    readers: dict[str, Any] = {
        "npy": lambda: np.load(file),
        "safetensors": lambda: load_file(file)["embeddings"],
        "json": lambda: json.loads(file.read_text())["vectors"],
        "jsonl": lambda: [json.loads(line) for line in file.read_text().splitlines()],
    }
    np.testing.assert_allclose(np.asarray(readers[file_format](), dtype=np.float32), wanted, atol=1e-7)
    piped = CliRunner().invoke(main, ["result", job.id, "--format", file_format], env=embedq.environment)
    if file_format != "safetensors":  # whose metadata is in any order
        assert piped.stdout_bytes == file.read_bytes()
    assert len(piped.stdout_bytes) == file.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_token_output_goes_into_every_format_that_can_hold_it(
    embedq: Shell, queue: EmbedQueue, drain: Drain, tmp_path: Path
) -> None:
    job_id = embedq("enqueue", "--one-job", "--tokens", "two words", "one").stdout.strip()
    drain()
    tokens = queue.result(job_id).tokens
    assert [len(part) for part in tokens] == [4, 3]
    file = tmp_path / "tokens"
    shown = embedq("result", job_id, "--format", "safetensors", "-o", str(file))
    assert "7 x 8 float32" in shown.stderr
    np.testing.assert_array_equal(load_file(file)["token_embeddings"], np.concatenate(tokens))
    lines = embedq("result", job_id, "--format", "jsonl").stdout.splitlines()
    assert [np.shape(json.loads(line)) for line in lines] == [(4, 8), (3, 8)]
    document = json.loads(embedq("result", job_id, "--format", "json").stdout)
    assert (document["output"], np.shape(document["vectors"][1])) == ("tokens", (3, 8))
    assert "7 x 8 float32 by noop:8" in embedq("result", job_id).stdout
    refused = embedq("result", job_id, "--format", "npy", "-o", str(tmp_path / "no.npy"))
    assert refused.exit_code == 1
    assert one_line(refused).startswith("error: npy cannot say which token is of which text")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_options_of_chunking_and_bytes_reach_the_job(embedq: Shell, queue: EmbedQueue, drain: Drain) -> None:
    embedq.environment |= {"EMBEDQ_CHUNK_OVERLAP": "50", "EMBEDQ_PRECISION": "uint8"}
    job_id = embedq("enqueue", "--chunk", "word " * 1000).stdout.strip()
    data = queue._redis.hget(keys.job(job_id), "data")
    assert b"chunk_overlap" in wire.inflate(data, wire.MAX_REQUEST_BYTES)
    drain()
    document = json.loads(embedq("result", job_id, "--format", "json").stdout)
    assert (document["num_tokens"], document["truncated"], document["calibration"]) == ([1002], [False], "unit")


def test_embed_waits_for_the_worker(embedq: Shell, queue: EmbedQueue, drain: Drain) -> None:
    shown: list[Result] = []
    arguments = ("embed", "a", "b", "--dimensions", "4", "--format", "npy")
    thread = threading.Thread(target=lambda: shown.append(embedq(*arguments)))
    thread.start()
    until(queue.depth)
    drain()
    thread.join(20)
    assert np.load(io.BytesIO(shown[0].stdout_bytes)).shape == (2, 4)


def test_jobs_can_be_delayed_deduplicated_and_made_to_wait(embedq: Shell, queue: EmbedQueue) -> None:
    first, again = (embedq("enqueue", "--dedupe", "a").stdout.strip() for _ in range(2))
    assert first == again
    options = ("--retries", "2", "--retry-intervals", "10, 60")
    late = embedq("enqueue", "--delay-s", "60", *options, "b", "c").stdout.split()
    after = embedq("enqueue", "--depends-on", first, "--depends-on", late[0], "d").stdout.strip()
    assert [queue.status(job_id).value for job_id in (*late, after)] == ["scheduled", "scheduled", "deferred"]
    assert queue._redis.hget(keys.job(late[0]), "retry_intervals") == b"[10,60]"
    full = embedq("enqueue", "--max-depth", "4", "e")
    assert full.exit_code == 1
    assert one_line(full) == "error: queue embed has 4 jobs and takes 4 at most; try again later"
    assert "is not a list of whole numbers" in one_line(embedq("enqueue", "--retry-intervals", "soon", "f"))


def test_a_group_is_counted_and_canceled_together(embedq: Shell, queue: EmbedQueue, drain: Drain) -> None:
    embedq.environment["EMBEDQ_GROUP"] = "nightly"
    embedq("enqueue", "a", "b")
    drain()
    embedq("enqueue", "c", "d", "e")
    assert embedq("group", "nightly").stdout == "finished  2\nqueued  3\n"
    assert json.loads(embedq("group", "nightly", "--json").stdout) == {"finished": 2, "queued": 3}
    canceled = embedq("group", "nightly", "--cancel")
    assert (canceled.stdout, canceled.stderr) == ("canceled  3\nfinished  2\n", "3 jobs canceled\n")
    assert queue.depth() == 0
    nobody = embedq("group", "nobody")
    assert nobody.exit_code == 3
    assert "group 'nobody' has no jobs" in one_line(nobody)


def test_embed_keeps_vectors_for_the_next_time(embedq: Shell, queue: EmbedQueue, drain: Drain) -> None:
    arguments = ("embed", "a", "--expect-model", "noop:8", "--cache-ttl", "100", "--format", "json")
    queue.enqueue("a", model="noop:8")
    shown: list[Result] = []
    thread = threading.Thread(target=lambda: shown.append(embedq(*arguments)))
    thread.start()
    until(lambda: queue.depth() == 2)
    drain()
    thread.join(20)
    again = embedq(*arguments, "--timeout", "0")
    assert json.loads(again.stdout)["vectors"] == json.loads(shown[0].stdout)["vectors"]
    refused = embedq("embed", "a", "--cache-ttl", "100")
    assert "cache_ttl needs model" in one_line(refused)


def test_cancel_and_requeue_say_what_became_of_each_job(embedq: Shell, queue: EmbedQueue, drain: Drain) -> None:
    one, two = queue.enqueue_many(["a", "b"], job_ids=["one", "two"])
    assert embedq("cancel", "one").stdout == "one  canceled\n"
    drain()
    assert embedq("cancel", "two", "one").stdout == "two  had ended before: finished\none  had ended before: canceled\n"
    assert json.loads(embedq("requeue", "one", "--json").stdout) == {"id": "one", "outcome": "queued"}
    assert one.status() is JobStatus.QUEUED
    several = embedq("requeue", "two", "nobody")
    assert several.exit_code == 1
    assert "only a failed or canceled job" in several.stderr
    assert "there is no job nobody" in several.stderr
    assert two.status() is JobStatus.FINISHED


def test_info_shows_queues_and_workers_without_changing_anything(embedq: Shell, queue: EmbedQueue) -> None:
    assert "no queues and no workers" in embedq("info").stdout
    queue.enqueue_many(["a", "b"])
    fields = {"state": "busy", "queues": "embed,urgent", "hostname": "box", "pid": "7", "embedq_model": "noop:8"}
    queue._redis.hset(keys.worker("w1"), mapping=fields)
    queue._redis.sadd(keys.WORKERS, keys.worker("w1"), keys.worker("gone"))
    queue._redis.set(keys.SUSPENDED, 1)
    before = sorted(queue._redis.keys("*"))
    seen = json.loads(embedq("info", "--json").stdout)
    [waiting] = seen["queues"]
    assert {
        "name": "embed",
        "queued": 2,
        "started": 0,
        "finished": 0,
        "failed": 0,
        "canceled": 0,
    }.items() <= waiting.items()
    assert [(w["name"], w["state"], w["queues"], w["model"]) for w in seen["workers"]] == [
        ("w1", "busy", ["embed", "urgent"], "noop:8"),
    ]
    assert seen["suspended"] is True
    shown = embedq("info").stdout
    assert "suspended" in shown
    assert "noop:8" in shown
    assert sorted(queue._redis.keys("*")) == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["enqueue", "x", "--dimensions", "0"], 2, "error: dimensions must be a whole number from 1"),
        (["enqueue", "x", "--job-id", "a b"], 2, "error: job id 'a b' does not do"),
        (["enqueue", "x", "--result-ttl", "-7"], 2, "error: result_ttl must be a whole number from -1 to"),
        (["enqueue", "x", "--prompt", "a", "--prompt-name", "b"], 2, "error: prompt and prompt_name exclude"),
        (["enqueue", "x", "--tokens", "--chunk"], 2, "error: output tokens and chunk exclude each other"),
        (["enqueue", "x", "--chunk-overlap", "3"], 2, "error: chunk_overlap needs chunk"),
        (["worker", "--model", "noop:8", "--calibration", "x"], 2, "error: noop:8 takes no calibration"),
        (["enqueue", "x" * 1_000_001], 2, "error: text 0 has 1,000,001 characters"),
        (["result", "nobody"], 3, "error: there is no job nobody"),
        (["cancel", "nobody"], 3, "error: there is no job nobody"),
        (["requeue", "nobody"], 3, "error: there is no job nobody"),
        (["embed", "x", "--timeout", "0.05"], 4, "error: 1 texts took more than 0.05 s"),
        (["enqueue", "x", "--queue", ""], 2, "error: the queue's name must be a string that is not empty"),
        (["enqueue", "x", "--prompt", "\udcff"], 2, "error: prompt is not Unicode"),
        (["enqueue", "x", "--url", "redis://[::1"], 2, "error: the Redis URL redis://... cannot be read"),
        (["up", "--port", "99999", "--model", "noop:8"], 2, "error: port 99999 is no port"),
        (["worker", ""], 2, "error: the queue's name must be a string that is not empty"),
        (["enqueue", "x", "--url", "redis://127.0.0.1:1"], 5, "error: no Redis at 127.0.0.1:1/0"),
        (["info", "--url", "redis://127.0.0.1:1"], 5, "error: no Redis at 127.0.0.1:1/0"),
        (["worker", "--startup-timeout-s", "0", "--url", "redis://127.0.0.1:1"], 5, "error: no Redis at 127.0.0.1:1/0"),
        (["enqueue", "x", "--url", "http://h"], 2, "error: http://... is no Redis URL; write redis://"),
        (["worker", "--lease-s", "0"], 2, "error: lease_s must be 1 to 86400"),
        (["worker", "--model", "noop:0"], 6, "error: noop:0"),
        (["worker", "--model", "./no/such/folder"], 6, "error: "),
    ],
)
def test_every_error_is_one_line_and_its_own_status(
    embedq: Shell, queue: EmbedQueue, arguments: list[str], status: int, message: str
) -> None:
    shown = embedq(*arguments)
    assert shown.exit_code == status
    assert one_line(shown).startswith(message)
    assert queue.depth() == 0
    assert queue._redis.scard(keys.WORKERS) == 0


def test_status_of_a_job_that_is_not_there_exits_with_3(embedq: Shell, queue: EmbedQueue) -> None:
    job = queue.enqueue("a")
    shown = embedq("status", job.id, "nobody")
    assert shown.exit_code == 3
    assert shown.stdout == f"{job.id}  queued\nnobody  not found\n"
    assert "1 of 2 jobs do not exist" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["enqueue"], "\n \n", "the input has no text"),
        (["enqueue"], b"\xff\xfe", "the input is not UTF-8"),
        (["enqueue", "x", "--file", "-"], "y", "give texts or --file, not both"),
        (["enqueue", "x", "y", "--job-id", "z"], None, "--job-id names one job"),
        (["enqueue", "--file", "/no/such/file"], None, "/no/such/file"),
        (["enqueue", "x", "--precision", "float8"], None, "'float8' is not one of"),
        (["embed", "x", "--output", "v.npy"], None, "--output needs --format"),
        (["embed", "x", "--format", "npy", "--output", "/no/such/folder/v.npy"], None, "there is no folder"),
        (["embed", "x", "--timeout", "-1"], None, "--timeout"),
        (["embed", "x", "--tokens", "--format", "npy", "--output", "v"], None, "npy cannot say which token is"),
        (["bogus"], None, "No such command 'bogus'"),
    ],
)
def test_wrong_usage_says_what_to_do_and_enqueues_nothing(
    embedq: Shell, queue: EmbedQueue, arguments: list[str], stdin: Any, message: str
) -> None:
    shown = embedq(*arguments, stdin=stdin)
    assert shown.exit_code == 2
    assert message in one_line(shown)
    assert one_line(shown).startswith("error: ")
    assert one_line(shown).endswith(" --help")
    assert queue.depth() == 0


def test_a_failed_job_exits_with_1_and_its_reason(embedq: Shell, queue: EmbedQueue, drain: Drain) -> None:
    job = queue.enqueue("a", dimensions=99)
    drain()
    shown = embedq("result", job.id)
    assert shown.exit_code == 1
    assert "dimensions must be 1 to 8 for this model, not 99 [code=unsupported_option" in one_line(shown)


def test_a_full_disk_leaves_the_old_file_as_it_was(
    embedq: Shell, queue: EmbedQueue, drain: Drain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.enqueue("a")
    drain()
    file = tmp_path / "v.npy"
    file.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.Path, "replace", full)
    shown = embedq("result", job.id, "--format", "npy", "--output", str(file))
    assert shown.exit_code == 1
    assert "No space left on device" in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]
    assert file.read_bytes() == b"old"


def test_a_group_without_a_command_shows_its_help(embedq: Shell) -> None:
    shown = embedq("model")
    assert "fetch" in shown.output
    assert len(shown.output.splitlines()) > 5


def test_an_unknown_option_before_the_command_is_one_line_too(embedq: Shell) -> None:
    shown = embedq("--bogus")
    assert shown.exit_code == 2
    assert one_line(shown).startswith("error: No such option")


def test_a_half_done_enqueueing_prints_the_ids_that_got_through(
    embedq: Shell, queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    do, steps = EmbedQueue._do, []

    def breaks_later(self: EmbedQueue, step: calls.Step) -> Any:
        steps.append(step)
        if len(steps) == 2:
            raise QueueConnectionError("gone")
        return do(self, step)

    monkeypatch.setattr("embedq.producer.requests.CHUNK_JOBS", 2)
    monkeypatch.setattr(EmbedQueue, "_do", breaks_later)
    shown = embedq("enqueue", "a", "b", "c")
    assert shown.exit_code == 5
    assert [status.value for status in queue.statuses(shown.stdout.split()).values() if status] == ["queued"] * 2


def test_debug_shows_the_traceback_too(embedq: Shell) -> None:
    shown = embedq("--debug", "result", "nobody")
    assert shown.exit_code == 3
    assert "Traceback" in shown.stderr
    assert "error: there is no job nobody" in shown.stderr


def test_every_option_has_its_environment_variable(embedq: Shell, queue: EmbedQueue) -> None:
    embedq.environment |= {"EMBEDQ_QUEUE": "other", "EMBEDQ_DIMENSIONS": "3", "EMBEDQ_RESULT_TTL": "77"}
    embedq.environment |= {"EMBEDQ_JSON": "1", "EMBEDQ_JOB_ID": "mine"}
    assert json.loads(embedq("enqueue", "x").stdout) == {"id": "mine"}
    fields = queue._redis.hgetall(keys.job("mine"))
    assert fields[b"origin"] == b"other"
    assert fields[b"result_ttl"] == b"77"
    assert b'"dimensions":3' in fields[b"data"]


def test_help_is_there_for_every_command_and_option(embedq: Shell) -> None:
    for name, command in main.commands.items():
        shown = embedq(name, "--help")
        assert shown.exit_code == 0
        assert command.help, name
        for option in command.params:
            if option.param_type_name == "option":
                assert getattr(option, "help", None), f"{name} {option.name}"


def test_a_binary_format_is_not_poured_into_a_terminal(url: str) -> None:
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "embedq.worker.cli", "embed", "x", "--format", "npy", "--url", url]
    shown = subprocess.run(command, stdout=inside, stderr=subprocess.PIPE, text=True, timeout=30)
    assert shown.returncode == 2
    assert "npy is not for a terminal; add --output FILE" in shown.stderr
    os.close(terminal)
    os.close(inside)
