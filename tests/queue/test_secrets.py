"""What nobody is to see: passwords in logs, errors and the list of processes; users' texts anywhere but in `data`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from rq import Queue

from embedq.producer import (
    AsyncEmbedQueue,
    ConfigurationError,
    EmbedqError,
    EmbedQueue,
    EmbedSerializer,
    JobStatus,
    QueueServerError,
    keys,
    wire,
)
from embedq.producer.connection import connect, connect_async
from embedq.worker import EmbedWorker, WorkerSettings
from embedq.worker.cli import main
from embedq.worker.redis_server import RedisServer, free_port
from tests.conftest import Drain, until
from tests.queue.test_worker import EMBEDQ

#: As it is, and as it stands in a URL.
SECRET, QUOTED = "pa55/w#rd", "pa55%2Fw%23rd"
#: Any piece of it, whichever way it is written.
PIECES = ("pa55", "w#rd", "w%23rd")
#: A word that stands in no code.
MARKER = "xylophonist"
TEXT = f"my private diary about the {MARKER} next door"


def assert_hidden(output: str) -> None:
    assert not [piece for piece in PIECES if piece in output], output


class ServerWithPassword(RedisServer):
    def _await_ready(self) -> None:
        until(self._answers)

    def _answers(self) -> bool:
        try:
            with connect(self.login) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    @property
    def login(self) -> str:
        return f"redis://:{QUOTED}@127.0.0.1:{self.port}/0"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerWithPassword]:
    folder = tmp_path_factory.mktemp("guarded")
    configuration = folder / "redis.conf"
    configuration.write_text(f'requirepass "{SECRET}"\n')
    with ServerWithPassword(folder, port=0, configuration=configuration) as server:
        yield server


class ServerWithoutHello(RedisServer):
    """Nobody can greet it, so that it is ready when it listens."""

    def _await_ready(self) -> None:
        def listens() -> bool:
            self.check()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port or 0)):
                return True
            return False

        until(listens)


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
def test_the_list_of_processes_does_not_show_a_workers_password(guarded: ServerWithPassword, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*EMBEDQ, "worker", "embed", "urgent", "--url", guarded.login, "--model", "noop:8", "--name", "w"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        with connect(guarded.login) as client:
            until(lambda: client.exists(keys.worker("w")))
            assert title(process.pid) == "embedq worker embed urgent"
            fields = {name.decode(): value.decode() for name, value in client.hgetall(keys.worker("w")).items()}
            assert_hidden(str(fields))
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert_hidden(log.read_text())


def failing_urls() -> list[str]:
    port = free_port()
    return [
        f"redis://user:{QUOTED}@127.0.0.1:{port}/0",
        f"redis://:{QUOTED}@127.0.0.1:{port}/0?socket_timeout={SECRET}",
        f"redis://127.0.0.1:{port}/0?password={QUOTED}",
        f"redis://127.0.0.1:{port}/{QUOTED}",
        f"redis://127.0.0.1:{QUOTED}/0",
        f"redis://:{SECRET}@127.0.0.1:{port}/0",
        f"redis://:{SECRET}@@@127.0.0.1:{port}:{port}/0",
        f"redis://[{QUOTED}",
        f"redi://:{QUOTED}@127.0.0.1/0",
        f":{QUOTED}@127.0.0.1",
        f"rediss://:{QUOTED}@127.0.0.1:{port}/0?ssl_keyfile=/none&ssl_password={QUOTED}",
        f"redis://{SECRET}@127.0.0.1:{port}",
        f"redis://127.0.0.1:{port}#{SECRET}@127.0.0.1:{port}",
        f"redis://user:12?{SECRET}@127.0.0.1:{port}/0",
        f"redis+sentinel://user:12/{SECRET}@127.0.0.1:{port}",
        f"unix://:12/{SECRET}@/no/such/socket",
        f"unix://:{QUOTED}@/no/such/socket",
        f"unix:///no/such/socket?password={QUOTED}&db={QUOTED}",
    ]


@pytest.mark.parametrize("url", failing_urls())
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
def test_a_url_that_does_not_do_is_told_without_its_password(url: str, debug: Sequence[str]) -> None:
    for arguments in (["status", "a"], ["info"], ["enqueue", "a"]):
        shown = CliRunner().invoke(main, [*debug, *arguments, "--url", url])
        assert shown.exit_code in (2, 5), shown.output
        assert_hidden(shown.output)


@pytest.mark.parametrize(
    "url", ["redis://me:12/pa55@h:1", "redis://pa55/word@h", "redis://:12#x@h", "redis://h/notadb"]
)
def test_what_may_be_a_piece_of_a_password_is_no_place_to_connect_to(url: str) -> None:
    for connecting in (connect, connect_async):
        with pytest.raises(ConfigurationError, match=r"the Redis URL redis://\.\.\. cannot be read"):
            connecting(url)


def causes(err: BaseException) -> Iterator[BaseException]:
    error: BaseException | None = err
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_a_server_that_does_not_know_hello_is_not_quoted(tmp_path: Path, short_path: Path) -> None:
    configuration = tmp_path / "redis.conf"
    configuration.write_text('rename-command HELLO ""\nrename-command AUTH ""\n')
    with ServerWithoutHello(short_path, port=0, configuration=configuration) as server:
        login = server.url.replace("redis://", f"redis://ann:{QUOTED}@")
        for url in (login, f"{login}?protocol=2"):
            for error in (*blocking_failure(url), *asyncio.run(awaited_failure(url))):
                assert_hidden(str(error))
                assert "Redis 6.2" in str(error)
            shown = subprocess.run(
                [*EMBEDQ, "--debug", "worker", "--url", url, "--model", "noop:8"],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert shown.returncode == 5
            assert_hidden(shown.stdout + shown.stderr)


def blocking_failure(url: str) -> list[BaseException]:
    with EmbedQueue(url) as queue, pytest.raises(QueueServerError) as caught:
        queue.depth()
    return list(causes(caught.value))


async def awaited_failure(url: str) -> list[BaseException]:
    async with AsyncEmbedQueue(url) as queue:
        with pytest.raises(QueueServerError) as caught:
            await queue.depth()
    return list(causes(caught.value))


def test_a_wrong_password_is_in_no_message_and_no_chain_of_causes(guarded: ServerWithPassword) -> None:
    url = guarded.login.replace(QUOTED, "wr0ng-pa55")
    with EmbedQueue(url) as queue, pytest.raises(EmbedqError) as caught:
        queue.enqueue("a text")
    for error in causes(caught.value):
        assert_hidden(str(error))
    assert_hidden(repr(queue))
    shown = subprocess.run(
        [*EMBEDQ, "--debug", "worker", "--url", url, "--model", "noop:8"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 5
    assert_hidden(shown.stdout + shown.stderr)


def test_a_password_in_the_environment_does_the_same_and_is_no_argument(guarded: ServerWithPassword) -> None:
    environment = {**os.environ, "EMBEDQ_URL": guarded.login}
    for arguments in (["info"], ["enqueue", "--help"], ["worker", "--help"]):
        command = [*EMBEDQ, *arguments]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert shown.returncode == 0, shown.stderr
        assert_hidden(shown.stdout + shown.stderr)


# --- users' texts


def with_markers(queue: EmbedQueue) -> list[str]:
    """Jobs with the marker wherever a text can stand, good ones and bad ones."""
    good = [
        queue.enqueue(TEXT),
        queue.enqueue([TEXT] * 3, prompt=f"{TEXT}: ", group="g"),
        queue.enqueue(TEXT * 1000, chunk=True, retries=0),
        queue.enqueue(TEXT, on_success="app.hooks.done"),
    ]
    bad = [
        queue.enqueue(TEXT * 1000, truncate=False, retries=0),
        queue.enqueue(TEXT, dimensions=99),
        queue.enqueue(TEXT, model=f"a model {MARKER}".replace(" ", "-")[:7]),
    ]
    planted = {
        "text": TEXT.encode(),
        "json": b'{"text": "%s"}' % TEXT.encode(),
        "function": wire.orjson.dumps([TEXT, None, [], {}]),
        "instance": wire.orjson.dumps([wire.FUNCTION, TEXT, [], {}]),
        "args": wire.orjson.dumps([wire.FUNCTION, None, [TEXT], {}]),
        "option": wire.orjson.dumps([wire.FUNCTION, None, [], {"texts": ["a"], TEXT: 1}]),
        "version": wire.orjson.dumps([wire.FUNCTION, None, [], {"texts": ["a"], "version": TEXT}]),
        "place": wire.orjson.dumps([wire.FUNCTION, None, [], {"texts": [TEXT, {"a": TEXT}], "precision": TEXT}]),
        "dimensions": wire.orjson.dumps([wire.FUNCTION, None, [], {"texts": [TEXT], "dimensions": TEXT}]),
        "precision": wire.orjson.dumps([wire.FUNCTION, None, [], {"texts": [TEXT], "precision": TEXT}]),
        "normalize": wire.orjson.dumps([wire.FUNCTION, None, [], {"texts": [TEXT], "normalize": [TEXT]}]),
    }
    for name, data in planted.items():
        fields = {"status": "queued", "data": data, "origin": "embed", "created_at": TEXT, "repeats_left": TEXT}
        queue._redis.hset(
            keys.job(name), mapping={**fields, "success_callback_timeout": TEXT, "timeout": TEXT, "meta": TEXT}
        )
        queue._redis.rpush(keys.queue("embed"), name)
    return [job.id for job in (*good, *bad)] + list(planted)


def everything_but_data(client: Any) -> list[tuple[str, str]]:
    """Key, and what stands there: but the fields that the test itself or a caller filled with text."""
    theirs = {b"data", b"created_at", b"repeats_left", b"success_callback_timeout", b"timeout", b"meta"}
    found = []
    for key in client.keys("*"):
        kind = client.type(key).decode()
        name = key.decode()
        if kind == "hash":
            found += [(name, repr(item)) for item in client.hgetall(key).items() if item[0] not in theirs]
        elif kind == "stream":
            for _, fields in client.xrange(key):
                reason = fields.get(b"exc_string")
                found.append((name, str(wire.decode_exc_string(reason)) if reason else repr(decoded(fields))))
        elif kind in ("set", "zset", "list"):
            read = {
                "set": client.smembers,
                "zset": lambda k: client.zrange(k, 0, -1),
                "list": lambda k: client.lrange(k, 0, -1),
            }
            found.append((name, repr(read[kind](key))))
    return found


def decoded(fields: dict[bytes, bytes]) -> object:
    value = fields.get(b"return_value")
    return wire.decode_result(wire.base64.b64decode(value)).to_plain() if value else fields


@pytest.mark.parametrize(
    "program",
    [
        [*EMBEDQ, "worker", "--burst", "--url"],
        [
            sys.executable,
            "-m",
            "rq.cli",
            "worker",
            "--burst",
            "--worker-class",
            "embedq.worker.EmbedWorker",
            "embed",
            "--url",
        ],
    ],
    ids=["embedq worker", "rq worker"],
)
def test_no_users_text_leaves_the_data_of_its_job(queue: EmbedQueue, url: str, program: list[str]) -> None:
    ids = with_markers(queue)
    shown = subprocess.run(
        [*program, url], capture_output=True, text=True, timeout=60, env={**os.environ, "EMBEDQ_MODEL": "noop:8"}
    )
    assert shown.returncode == 0, shown.stderr
    assert "micro-batch" in shown.stdout + shown.stderr  # it did say something
    assert MARKER not in shown.stdout + shown.stderr
    statuses = queue.statuses(ids)
    assert JobStatus.QUEUED not in statuses.values()
    assert list(statuses.values()).count(JobStatus.FINISHED) == 4
    leaks = [(key, found) for key, found in everything_but_data(queue._redis) if MARKER in found]
    assert leaks == []


def test_a_description_holds_the_text_only_if_the_caller_says_so(queue: EmbedQueue, drain: Drain) -> None:
    plain, described = queue.enqueue(TEXT), queue.enqueue("a", description=TEXT)
    assert queue._redis.hget(keys.job(plain.id), "description") == b"embed 1 text, %d characters" % len(TEXT)
    assert queue._redis.hget(keys.job(described.id), "description") == TEXT.encode()
    drain()


def test_rqs_own_messages_of_our_worker_name_no_text(
    queue: EmbedQueue, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that RQ enqueued has the text in its description, which RQ's own worker logs."""
    theirs = Queue("embed", connection=queue._client, serializer=EmbedSerializer)
    job = theirs.enqueue(wire.FUNCTION, kwargs={"texts": [TEXT]})
    assert MARKER in str(job.description)
    with connect(url) as client, caplog.at_level("INFO"):
        EmbedWorker(["embed"], connection=client, settings=WorkerSettings(model="noop:8")).work(burst=True)
    assert job.get_status() == "finished"
    assert MARKER not in caplog.text


def test_what_a_job_brings_into_a_log_begins_no_other_line(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from embedq.worker.telemetry import logs

    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    try:
        logs.configure("text")
        logging.getLogger("embedq.worker").warning("job %s failed", "a\n2026-01-01 ERROR forged\x1b[2J")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert capfd.readouterr().err.count("\n") == 1
