"""Whoever can write into Redis: nothing of theirs runs, no worker ends by it, no other job suffers.

And memory stays bounded.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from click.testing import CliRunner
from rq import Queue, Worker
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import resolve_serializer

from embedq.model import NoopEncoder
from embedq.producer import (
    AsyncEmbedQueue,
    Embeddings,
    EmbedqError,
    EmbedQueue,
    EmbedSerializer,
    JobFailedError,
    JobStatus,
    keys,
    wire,
)
from embedq.producer.connection import connect
from embedq.worker.claims import ClaimStore, Outcome
from embedq.worker.cli import main
from embedq.worker.promotion import Promoter
from tests.conftest import Drain, until
from tests.queue.hostile import JOB_FIELDS, ForeignParty, bombs, planted_pickles
from tests.queue.test_worker import EMBEDQ

ROOT = Path(__file__).parents[2]
FOLDERS = ("producer", "worker", "model")
#: Modules that make objects, code or processes of bytes.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "runpy"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
MIB = 1024 * 1024


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that is there once any of the planted pickles was loaded."""
    file = tmp_path / "loaded"
    yield file
    assert not file.exists(), "a pickle was loaded"


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """The most memory that a process has had, seen until it ends."""
    peak = 0
    while process.poll() is None:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.05)
    return peak


def run_worker(url: str, log: Path, *arguments: str) -> tuple[int, int, str]:
    """Exit status, most bytes of memory and output of `embedq worker --burst`."""
    command = [*EMBEDQ, "worker", "--url", url, "--model", "noop:8", "--burst", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        peak = peak_bytes(process)
        return process.wait(60), peak, log.read_text(errors="replace")
    finally:
        process.kill()


def plant_job(client: Any, job_id: str, status: str, fields: dict[str, bytes]) -> None:
    client.hset(keys.job(job_id), mapping={"status": status, "data": b"x", "origin": "embed", **fields})


# --- no pickle


def plant_pickles(queue: EmbedQueue, blobs: list[bytes]) -> list[str]:
    """In every field of jobs in every state, and in all that RQ keeps beside them; the ids of the jobs."""
    client = queue._redis
    ids = []
    for place, blob in enumerate(blobs):
        for field in JOB_FIELDS:
            if field not in ("status", "origin"):
                ids.append(f"waiting-{field}-{place}")
                plant_job(client, ids[-1], "queued", {field: blob})
                client.rpush(keys.queue("embed"), ids[-1])
        everywhere = {field: blob for field in JOB_FIELDS if field not in ("status", "origin")}
        for status, registry in (("scheduled", keys.scheduled), ("failed", keys.failed), ("deferred", keys.deferred)):
            ids.append(f"{status}-{place}")
            plant_job(client, ids[-1], status, everywhere)
            client.zadd(registry("embed"), {ids[-1]: 1})
        for status in ("finished", "failed", "stopped", "started"):
            ids.append(f"{status}-with-result-{place}")
            plant_job(client, ids[-1], status, everywhere)
            entry = {"type": 1, "return_value": blob, "exc_string": blob, "worker_name": blob, "execution_id": blob}
            client.xadd(keys.results(ids[-1]), entry)
            client.zadd(keys.started("embed"), {f"{ids[-1]}:e": 1})
            client.hset(
                keys.execution(ids[-1], "e"), mapping=dict.fromkeys(("worker_name", "queue", "created_at"), blob)
            )
            client.sadd(keys.dependents(ids[-1]), blob, *ids[:3])
            client.sadd(keys.group("g"), blob, ids[-1])
        client.sadd(keys.GROUPS, "g", blob)
        client.sadd(keys.RATE_LIMITS, blob)
        client.hset(
            keys.worker(f"w{place}"), mapping=dict.fromkeys(("state", "queues", "pid", "birth", "current_job"), blob)
        )
        client.sadd(keys.WORKERS, keys.worker(f"w{place}"))
        client.zadd(keys.sequels("embed"), {f"failed-with-result-{place}": 1, blob: 1})
    return ids


def test_the_planted_pickles_are_live_ones(tmp_path: Path) -> None:
    file = tmp_path / "loaded"
    plain, packed, *_ = planted_pickles(file)
    pickle.loads(plain).close()
    assert file.exists()
    assert zlib.decompress(packed) == plain


def test_no_pickle_in_any_field_is_ever_loaded(each_url: str, drain: Drain, canary: Path) -> None:
    with EmbedQueue(each_url) as queue:
        ids = plant_pickles(queue, planted_pickles(canary))
        good = queue.enqueue("a good text")
        drain(at=each_url)
        assert good.status() is JobStatus.FINISHED
        with connect(each_url) as client:
            Promoter(client, ["embed"]).round()
        look_at_everything(queue, each_url, ids)
        asyncio.run(look_async(each_url, ids))
        for name in ids:
            with suppress(EmbedqError):
                queue.requeue(name)
            with suppress(EmbedqError):
                queue.cancel(name)
        drain(at=each_url)


def test_rqs_command_with_our_class_loads_none_either(queue: EmbedQueue, url: str, canary: Path) -> None:
    plant_pickles(queue, planted_pickles(canary))
    good = queue.enqueue("a good text")
    command = [sys.executable, "-m", "rq.cli", "worker", "--burst", "--worker-class", "embedq.worker.EmbedWorker"]
    environment = {**os.environ, "EMBEDQ_MODEL": "noop:8"}
    shown = subprocess.run(
        [*command, "embed", "--url", url], capture_output=True, text=True, timeout=60, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    assert good.status() is JobStatus.FINISHED


def look_at_everything(queue: EmbedQueue, url: str, ids: list[str]) -> None:
    """As clients, our command and RQ's own classes with our serializer do."""
    queue.statuses(ids)
    outcomes = queue.results(ids, timeout=0)
    assert not [outcome for outcome in outcomes.values() if isinstance(outcome, Embeddings)]
    queue.group("g").counts()
    runner = CliRunner()
    for arguments in (["info"], ["info", "--json"], ["status", *ids[:20]], ["group", "g"]):
        assert runner.invoke(main, [*arguments, "--url", url]).exception is None
    assert runner.invoke(main, ["result", "failed-with-result-0", "--timeout", "0", "--url", url]).exit_code == 1
    with connect(url) as client:
        theirs = Queue("embed", connection=client, serializer=EmbedSerializer)
        for name in ids:
            # Many a field cannot be read at all: RQ's classes raise what they will.
            with suppress(Exception):
                job = Job.fetch(name, connection=client, serializer=EmbedSerializer)
                assert not isinstance(job.meta, str)
                _ = job.func_name
            with suppress(Exception):
                Result.fetch(Job(name, connection=client, serializer=EmbedSerializer), serializer=EmbedSerializer)
        for registry in (FailedJobRegistry, ScheduledJobRegistry, StartedJobRegistry):
            with suppress(Exception):
                registry(queue=theirs).get_job_ids()
        with suppress(Exception):
            Worker.all(connection=client, serializer=EmbedSerializer)


async def look_async(url: str, ids: list[str]) -> None:
    async with AsyncEmbedQueue(url) as queue:
        await queue.statuses(ids)
        await queue.results(ids, timeout=0)
        await queue.group("g").counts()


def test_a_pickle_on_a_workers_channel_is_only_logged(queue: EmbedQueue, drain: Drain, canary: Path) -> None:
    worker = drain()
    for blob in planted_pickles(canary):
        worker.handle_payload({"type": "message", "data": blob})
        worker.handle_payload({"type": "message", "data": orjson.dumps({"command": "stop-job", "job_id": blob.hex()})})


def test_our_serializer_is_the_one_rq_is_given(queue: EmbedQueue, drain: Drain) -> None:
    worker = drain()
    assert worker.serializer is EmbedSerializer
    assert resolve_serializer("embedq.producer.serializer.EmbedSerializer") is EmbedSerializer
    assert {each.serializer for each in worker.queues} == {EmbedSerializer}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_of_ours_makes_objects_or_code_of_bytes(folder: str) -> None:
    found = []
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                found.append(f"{file}:{node.lineno} calls {node.func.id}")
            found += [f"{file} imports {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES]
    assert found == []


# --- only embed, and nothing that a job names


def call(function: Any = wire.FUNCTION, instance: Any = None, args: Any = (), kwargs: Any = None) -> bytes:
    return zlib.compress(orjson.dumps([function, instance, args, {"texts": ["a"]} if kwargs is None else kwargs]))


@pytest.mark.parametrize(
    "data",
    [
        call("os.getpid", kwargs={}),
        call("os.system", args=["touch /tmp/never"], kwargs={}),
        call("lambda: 1"),
        call("embedq.worker.tasks._engine", kwargs={}),
        call("embedq.worker.tasks.embed.__globals__"),
        call(" embedq.worker.tasks.embed"),
        call(["embedq.worker.tasks.embed"]),
        call(instance="an instance"),
        call(instance={}),
        call(instance=False),
        call(args=["a"]),
        call(args={"texts": 1}),
        call(kwargs=["texts"]),
        call(kwargs={"texts": ["a"], "model_path": "/etc/passwd"}),
        call(kwargs={"texts": ["a"], "device": "cuda"}),
        call(kwargs={"texts": ["a"], "version": 0}),
        call(kwargs={"texts": ["a"], "version": 10**9}),
        call(kwargs={"texts": ["a"], "version": True}),
        zlib.compress(orjson.dumps([wire.FUNCTION, None, [], {"texts": ["a"]}, "more"])),
        zlib.compress(orjson.dumps([wire.FUNCTION, None, []])),
    ],
)
def test_a_job_that_asks_for_anything_else_fails_and_does_nothing(queue: EmbedQueue, drain: Drain, data: bytes) -> None:
    plant_job(queue._redis, "other", "queued", {"data": data, "retries_left": b"3"})
    queue._redis.rpush(keys.queue("embed"), "other")
    worker = drain()
    with pytest.raises(JobFailedError) as caught:
        queue.result("other", timeout=0)
    assert (caught.value.code, caught.value.retryable) == ("bad_payload", False)
    assert worker.failed_job_count == 1  # no retry


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that nobody is to connect to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


@pytest.mark.parametrize("kind", ["finished", "failed", "abandoned", "with dependents"])
def test_a_webhook_that_a_job_names_is_never_called(
    queue: EmbedQueue, drain: Drain, listener: socket.socket, kind: str
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    hooks = [{"url": url, "job_status": status, "method": "POST"} for status in ("finished", "failed", "stopped")]
    job = queue.enqueue("a text", retries=0)
    fields: dict[str, Any] = {"webhooks": json.dumps(hooks), "success_callback_name": "os.getpid", "repeats_left": "1"}
    if kind == "failed":
        fields["data"] = b"nonsense"
    queue._redis.hset(keys.job(job.id), mapping=fields)
    if kind == "abandoned":
        queue._redis.delete(keys.queue("embed"))
        queue._redis.hset(keys.job(job.id), "status", "started")
        queue._redis.zadd(keys.started("embed"), {f"{job.id}:e": 1})
    elif kind == "with dependents":
        queue._redis.sadd(keys.dependents(job.id), job.id)
    drain()
    assert job.status().is_terminal
    with pytest.raises(TimeoutError):
        listener.accept()


# --- keys of other types


def fixed_keys(worker: str) -> list[str]:
    registries = (keys.started, keys.finished, keys.failed, keys.canceled, keys.scheduled, keys.deferred, keys.sequels)
    return [
        *(keys.QUEUES, keys.GROUPS, keys.RATE_LIMITS, keys.queue("embed"), keys.group("g")),
        *(registry("embed") for registry in registries),
        *(keys.worker(worker), keys.worker_executions(worker), keys.worker_claim(worker)),
    ]


@pytest.mark.parametrize("kind", ["string", "stream"])
@pytest.mark.parametrize("key", fixed_keys("w"))
def test_a_key_of_another_type_gives_way_in_every_script(each_url: str, key: str, kind: str) -> None:
    with EmbedQueue(each_url) as queue:
        client = queue._redis
        store = ClaimStore(queue._client, "w", lease_s=30)

        def plant() -> None:
            client.delete(key)
            _ = client.set(key, "a string") if kind == "string" else client.xadd(key, {"a": "stream"})

        plant()
        queue.enqueue("a", job_id="finished", group="g")
        plant() if "queue" not in key else None
        [claim] = store.claim(["embed"], 10, 10**6).claims
        if not key.endswith((":wip:embed", ":executions")):
            plant()
        store.renew([claim], 60)
        assert store.publish([Outcome.finished(claim, b"\0" * 100, 0.1)]) == []
        assert queue.status("finished") is JobStatus.FINISHED
        plant()
        queue.enqueue("b", job_id="released")
        [claim] = store.claim(["embed"], 10, 10**6).claims
        if not key.endswith(":wip:embed"):
            plant()
        assert len(store.release([claim])) == 1
        plant() if "queue" not in key else None
        queue.cancel("released")
        plant()
        queue.requeue("released")
        assert queue.status("released") is JobStatus.QUEUED
        plant()
        store.recover("embed")
        plant()
        Promoter(queue._client, ["embed"]).promote()
        plant()
        queue.enqueue_in(60, "c", job_id="later")
        assert queue.status("later") is JobStatus.SCHEDULED


def test_an_idle_worker_outlives_a_string_under_its_queues_name(
    queue: EmbedQueue, drain: Drain, tmp_path: Path, url: str
) -> None:
    with (tmp_path / "log").open("wb") as log:
        command = [*EMBEDQ, "worker", "--url", url, "--model", "noop:8", "--name", "w"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: queue._redis.hget(keys.worker("w"), "state") == b"idle")
        for key in fixed_keys("w"):
            queue._redis.set(key, "a string")
        job = queue.enqueue("a text")
        assert len(job.result(timeout=30)) == 1
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(20) == 0, (tmp_path / "log").read_text()


# --- a thousand of them


@pytest.mark.slow
def test_a_thousand_hostile_jobs_harm_no_good_one(each_url: str, canary: Path, tmp_path: Path) -> None:
    with EmbedQueue(each_url) as queue:
        party = ForeignParty(queue._redis, "embed", seed=5, file=canary)
        texts = [f"a good text, number {number}" for number in range(200)]
        good = []
        for text in texts:
            good.append(queue.enqueue(text))
            for _ in range(5):
                party.push()
        party.push_bombs()
        status, peak, output = run_worker(each_url, tmp_path / "log")
        assert status == 0, output
        assert "Traceback" not in output
        expected = NoopEncoder(8)
        for job, text in zip(good, texts, strict=True):
            vectors = expected.encode_tokens(expected.tokenize([text]))
            np.testing.assert_allclose(job.result(timeout=0).vectors, vectors, rtol=1e-6)
        assert queue._redis.llen(keys.queue("embed")) == 0
        assert {queue.status(f"bomb-{number}") for number in range(len(bombs()))} == {JobStatus.FAILED}
        assert peak < 600 * MIB


# --- memory


def inflating(num_texts: int, number: int) -> bytes:
    """A good request of MAX_JOB_CHARS in some 16 KB."""
    return wire.encode_request([f"{number} " + "a" * 999_000] * num_texts, wire.EmbedOptions())


@pytest.mark.slow
def test_jobs_that_inflate_a_thousandfold_do_not_take_a_workers_memory(
    queue: EmbedQueue, url: str, tmp_path: Path
) -> None:
    """Forty of 16 MB each would be 640 MB, were they all in memory at once."""
    for number in range(40):
        plant_job(
            queue._redis,
            f"large-{number}",
            "queued",
            {"data": zlib.compress(zlib.decompress(inflating(16, number)), 9)},
        )
        queue._redis.rpush(keys.queue("embed"), f"large-{number}")
    status, peak, output = run_worker(url, tmp_path / "log", "--max-batch-tokens", "1000000")
    assert status == 0, output
    assert {queue.status(f"large-{number}") for number in range(40)} == {JobStatus.FINISHED}
    assert peak < 400 * MIB


def test_a_field_of_hundreds_of_megabytes_stays_in_redis(queue: EmbedQueue, url: str, tmp_path: Path) -> None:
    for number in range(3):
        for field, size in (
            ("data", 200 * MIB),
            ("enqueued_at", 20 * MIB),
            ("meta", 20 * MIB),
            ("description", 20 * MIB),
        ):
            job_id = f"{field}-{number}"
            plant_job(queue._redis, job_id, "queued", {"data": call(), "repeats_left": b"x", field: b"x" * size})
            queue._redis.rpush(keys.queue("embed"), job_id)
    good = queue.enqueue("a good text")
    status, peak, output = run_worker(url, tmp_path / "log")
    assert status == 0, output
    assert good.status() is JobStatus.FINISHED
    with pytest.raises(JobFailedError, match=r"the job's data has 209,715,200 bytes; at most 67,108,864 go"):
        queue.result("data-0", timeout=0)
    assert len(queue.result("enqueued_at-0", timeout=0)) == 1
    assert peak < 250 * MIB
    queue._redis.flushall()


def test_the_number_of_bytes_that_stay_in_redis_is_the_same_on_both_sides() -> None:
    script = (ROOT / "worker" / "claim.lua").read_text()
    assert f"MAX_DATA_BYTES = {wire.MAX_DATA_BYTES} " in script


@pytest.mark.parametrize("claimed_texts", [b"nan", b"-inf", b"1e400", b"-5", b"x" * 1000])
def test_what_a_job_says_of_its_texts_does_not_lift_the_bound_of_a_claim(
    queue: EmbedQueue, claimed_texts: bytes
) -> None:
    store = ClaimStore(queue._client, "w", lease_s=30)
    for number in range(50):
        plant_job(queue._redis, f"job-{number}", "queued", {"data": b"x" * 1000, "embedq_texts": claimed_texts})
        queue._redis.rpush(keys.queue("embed"), f"job-{number}")
    assert 1 <= len(store.claim(["embed"], 1000, 10_000).claims) <= 10


@pytest.mark.parametrize("retries_left", [b"nan", b"inf", b"-1", b"1e400", b"0x10", b"abc", b"9" * 400])
def test_retries_beyond_reason_end(queue: EmbedQueue, retries_left: bytes) -> None:
    store = ClaimStore(queue._client, "w", lease_s=30)
    plant_job(queue._redis, "job", "queued", {"data": call(), "retries_left": retries_left})
    queue._redis.rpush(keys.queue("embed"), "job")
    attempts = 0
    failure = JobFailedError("no", code="internal", retryable=True)
    while queue.status("job") is JobStatus.QUEUED:
        store.publish([Outcome.failed(claim, failure) for claim in store.claim(["embed"], 1, 10**6).claims])
        attempts += 1
    assert queue.status("job") is JobStatus.FAILED
    assert attempts <= 1001


# --- what is not ours to mend


def test_rqs_own_info_reads_pickle_which_the_security_notes_warn_of(each_url: str, tmp_path: Path) -> None:
    """RQ's tools ignore the serializer where they look at queues. Should this fail, SECURITY.md can say less."""
    file = tmp_path / "loaded"
    with connect(each_url) as client:
        plant_job(client, "evil", "started", {"meta": planted_pickles(file)[0]})
        client.zadd(keys.started("embed"), {"evil:e": 1})
        client.sadd(keys.QUEUES, keys.queue("embed"))
    command = [sys.executable, "-m", "rq.cli", "info", "--url", each_url]
    subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert file.exists()
