"""EMBEDQ_PASSWORD_FILE: the URL's password in a file, as container platforms hand out secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from embedq.producer import ConfigurationError
from embedq.producer.connection import connect
from embedq.producer.password_file import MAX_PASSWORD_CHARS, VARIABLE, with_password
from embedq.worker.cli import main

#: As it is, and as it stands in a URL.
SECRET, QUOTED = "pa55/w#rd@é", "pa55%2Fw%23rd%40%C3%A9"


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\nthe one before\n", encoding="utf-8")
    monkeypatch.setenv(VARIABLE, str(file))
    return file


@pytest.mark.parametrize(
    ("url", "with_it"),
    [
        ("redis://otter@redis:6379/0", f"redis://otter:{QUOTED}@redis:6379/0"),
        ("redis://redis:6379/0", f"redis://:{QUOTED}@redis:6379/0"),
        ("rediss://otter@redis?ssl_ca_certs=/a@b", f"rediss://otter:{QUOTED}@redis?ssl_ca_certs=/a@b"),
        ("unix:///run/redis@1.sock", f"unix://:{QUOTED}@/run/redis@1.sock"),
        ("redis+sentinel://otter@a,b:1/mymaster/0", f"redis+sentinel://otter:{QUOTED}@a,b:1/mymaster/0"),
        ("redis://[::1]:6379/0", f"redis://:{QUOTED}@[::1]:6379/0"),
        ("redis://otter:mine@redis:6379/0", "redis://otter:mine@redis:6379/0"),
        ("redis://otter:@redis:6379/0", "redis://otter:@redis:6379/0"),
        ("no url", "no url"),
    ],
)
@pytest.mark.usefixtures("secret")
def test_the_files_first_line_is_the_password_of_a_url_that_has_none(url: str, with_it: str) -> None:
    assert with_password(url) == with_it


def test_without_the_variable_a_url_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert with_password("redis://otter@redis:6379/0") == "redis://otter@redis:6379/0"


@pytest.mark.usefixtures("secret")
def test_redis_is_told_the_password_as_it_stands_in_the_file() -> None:
    with connect(with_password("redis://otter@localhost:1/0")) as client:
        settings = client.connection_pool.connection_kwargs
        assert (settings["username"], settings["password"]) == ("otter", SECRET)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has no password in its first line"),
        (b"\nsecond", "has no password in its first line"),
        (b"\xff\xfe", "cannot be read: it is no UTF-8 text"),
        (b"x" * (MAX_PASSWORD_CHARS + 1), "is no password: its first line is too long"),
    ],
)
def test_a_file_that_has_no_password_is_named_and_nothing_of_it_is_shown(
    secret: Path, content: bytes | None, complaint: str
) -> None:
    if content is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        with_password("redis://otter@redis:6379/0")
    assert str(secret) in str(raised.value)
    assert "xxx" not in str(raised.value)


def test_the_command_line_reads_the_file_and_says_in_one_line_what_is_wrong_with_it(secret: Path) -> None:
    secret.unlink()
    shown = CliRunner().invoke(main, ["info", "--url", "redis://otter@localhost:1/0"])
    assert shown.exit_code == 2
    assert shown.output.startswith(f"error: {VARIABLE}={secret} cannot be read")
    assert shown.output.count("\n") == 1
