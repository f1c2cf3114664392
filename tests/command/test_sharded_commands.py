"""Client commands on several servers, named in EMBEDQ_URL; what serves one server says so."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.command.test_client_commands import Shell, one_line
from tests.conftest import Drain


@pytest.fixture
def urls(url: str) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory(prefix="eq-") as folder, RedisServer(Path(folder)) as server:
        yield [url, server.url]


@pytest.fixture
def embedq(urls: list[str]) -> Shell:
    return Shell(f"old={urls[0]}\n{urls[1]} ")


def test_jobs_on_two_servers_are_followed_by_their_ids(embedq: Shell, urls: list[str], drain: Drain) -> None:
    texts = [f"text {number}" for number in range(20)]
    ids = embedq("enqueue", *texts, "--group", "g").stdout.split()
    assert len(ids) == 20
    each = [Shell(url)("group", "g").stdout.split() for url in urls]
    assert [name for name, _ in each] == ["queued", "queued"]
    assert sum(int(number) for _, number in each) == 20
    assert embedq("cancel", ids[0]).stdout == f"{ids[0]}  canceled\n"
    assert embedq("requeue", ids[0]).exit_code == 0
    for url in urls:
        drain(at=url)
    assert embedq("group", "g").stdout == "finished  20\n"
    assert embedq("status", *ids).stdout == "".join(f"{job_id}  finished\n" for job_id in ids)
    assert embedq("result", ids[3]).exit_code == 0


def test_an_id_that_neither_server_knows_is_not_found(embedq: Shell) -> None:
    shown = embedq("result", "unheard-of", "--timeout", "0")
    assert shown.exit_code == 3
    assert "there is no job unheard-of" in one_line(shown)


@pytest.mark.parametrize("command", [["worker", "--burst", "--model", "noop:8"], ["info"]])
def test_what_serves_one_server_refuses_several(embedq: Shell, command: list[str]) -> None:
    shown = embedq(*command)
    assert shown.exit_code == 2
    assert "names several servers where one is meant" in one_line(shown)


def test_two_servers_of_one_name_are_refused(url: str) -> None:
    shown = Shell(f"{url} {url}")("enqueue", "x")
    assert shown.exit_code == 2
    assert "two shards are called" in one_line(shown)


def test_a_password_from_a_file_is_every_servers(
    urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = tmp_path / "password"
    password.write_text("secret")
    monkeypatch.setenv("EMBEDQ_PASSWORD_FILE", str(password))
    for url in urls:
        with connect(url) as client:
            client.config_set("requirepass", "secret")
    try:
        assert len(Shell(" ".join(urls))("enqueue", *map(str, range(20))).stdout.split()) == 20
    finally:
        for url in urls:
            with connect(f"{url}?password=secret") as client:
                client.config_set("requirepass", "")
