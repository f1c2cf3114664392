"""The scripts that start Redis in a container, on a real one: users from secrets, passwords replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from embedq.worker.redis_server import CONFIGURATION, free_port
from tests.conftest import until
from tests.docker.files import DOCKER

PASSWORDS = {"worker": "w1\nw0\n", "producer": "p1\n", "observer": "o1", "exporter": "e1", "admin": "a1\n"}


class Container:
    """The folders of a container of Redis, and its process. Attributes: port, secrets."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folders = {name: folder / name.lower() for name in ("SECRETS", "CONFIG", "RUN", "DATA")}
        for made in self._folders.values():
            made.mkdir()
        self.secrets = self._folders["SECRETS"]
        for user, password in PASSWORDS.items():
            (self.secrets / f"{user}-password").write_text(password)
        shutil.copy(CONFIGURATION, self._folders["CONFIG"])
        shutil.copy(CONFIGURATION.with_name("users.acl"), self._folders["CONFIG"])

    def command(self, script: str) -> subprocess.Popen[bytes]:
        variables = {name: str(path) for name, path in self._folders.items()}
        variables |= {"PATH": os.environ["PATH"], "REDIS_PORT": str(self.port), "REDIS_MAXMEMORY": "100mb"}
        return subprocess.Popen(["sh", DOCKER / "redis" / script], env=variables, stdout=subprocess.DEVNULL)

    def lets_in(self, user: str, password: str) -> bool:
        # Without retries: a server that is not there yet is asked again by who waits for it.
        once = Retry(NoBackoff(), 0)
        with redis.Redis(port=self.port, username=f"embedq-{user}", password=password, retry=once) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    if shutil.which("redis-server") is None:
        # users.acl is for Redis 7; the embedded server is 6.2.
        if os.environ.get("CI") == "true":
            pytest.fail("no redis-server is installed, which CI must not miss")
        pytest.skip("no redis-server is installed")
    made = Container(tmp_path)
    process = made.command("start.sh")
    try:
        until(lambda: made.lets_in("observer", "o1"))
        yield made
    finally:
        process.terminate()
        process.wait(20)


def test_every_line_of_a_secret_lets_its_user_in_and_nobody_else(container: Container) -> None:
    allowed = [("worker", "w1"), ("worker", "w0"), ("producer", "p1"), ("admin", "a1")]
    assert all(container.lets_in(user, password) for user, password in allowed)
    assert not container.lets_in("worker", "p1")
    assert not container.lets_in("worker", "")
    with redis.Redis(port=container.port) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()


def test_the_settings_are_ours_and_users_may_do_what_the_shipped_file_says(container: Container) -> None:
    with redis.Redis(port=container.port, username="embedq-admin", password="a1", decode_responses=True) as admin:
        found = admin.config_get("maxmemory", "maxmemory-policy", "appendonly", "dir")
        assert found["maxmemory"] == str(100 * 1024**2)
        assert (found["maxmemory-policy"], found["appendonly"]) == ("noeviction", "yes")
    with (
        redis.Redis(port=container.port, username="embedq-worker", password="w1") as worker,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        worker.flushall()


def test_a_changed_secret_counts_once_the_users_are_written_and_loaded_again(container: Container) -> None:
    (container.secrets / "worker-password").write_text("w2\nw1\n")
    assert container.command("users.sh").wait(20) == 0
    with redis.Redis(port=container.port, username="embedq-admin", password="a1") as admin:
        admin.acl_load()
    assert [container.lets_in("worker", password) for password in ("w2", "w1", "w0")] == [True, True, False]


def test_an_empty_secret_is_an_error_and_leaves_the_users_as_they_are(container: Container) -> None:
    (container.secrets / "worker-password").write_text("\n")
    assert container.command("users.sh").wait(20) == 1
    with redis.Redis(port=container.port, username="embedq-admin", password="a1") as admin:
        admin.acl_load()
    assert container.lets_in("worker", "w1")
