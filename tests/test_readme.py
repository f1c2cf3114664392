"""The README's code runs, as printed, against a worker with the stand-in and (where it says so) the real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedq.producer.connection import connect
from embedq.worker.local import local_service
from embedq.worker.redis_server import RedisServer
from embedq.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: What starts something that stays, or needs a machine that isn't here; other tests run these.
NOT_HERE = ("embedq up", "embedq worker", "embedq bench", "rq worker", "make ", "export ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(NOT_HERE)]


@contextmanager
def running_service() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="eq-") as folder:
        server = RedisServer(Path(folder))
        with local_service(server, "embed", WorkerSettings(model="noop:768")):
            yield server.url


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with running_service() as url:
        yield url


def test_the_clients_code_runs(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in blocks("python") if "with EmbedQueue(" in block)
    assert '"redis://localhost:6379/0"' in code
    scope: dict[str, object] = {}
    exec(code.replace("redis://localhost:6379/0", service), scope)
    assert "(2, 768) float32 noop:768" in capsys.readouterr().out
    assert len(scope["outcomes"]) == 1000  # type: ignore[arg-type]
    assert not any(isinstance(outcome, Exception) for outcome in scope["outcomes"].values())  # type: ignore[attr-defined]


def test_the_event_loops_code_runs(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in blocks("python") if "AsyncEmbedQueue(" in block)
    assert '"redis://localhost:6379/0"' in code
    exec(code.replace("redis://localhost:6379/0", service), {})
    assert capsys.readouterr().out == "100 (1, 768)\n0 (768,)\n1 (768,)\n"


def test_the_code_for_several_servers_runs(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in blocks("python") if "ShardedEmbedQueue(" in block)
    with running_service() as other:
        exec(code.replace("redis://redis-1:6379/0", service).replace("redis://redis-2:6379/0", other), {})
    assert capsys.readouterr().out.startswith("(1, 768)\n{")


@pytest.mark.real_model
def test_the_librarys_code_runs(real_model_path: Path) -> None:
    code = next(block for block in blocks("python") if "SentenceEncoder" in block)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["vectors"].shape == (2, 768)  # type: ignore[attr-defined]


def test_the_commands_run_in_their_order(service: str, tmp_path: Path) -> None:
    shown = commands()
    assert len(shown) >= 5
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with connect(service) as client:
        client.flushdb()
    for command in shown:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "EMBEDQ_URL": service, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "otters.npy").stat().st_size > 768 * 4


def test_every_make_target_that_it_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {"run", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_file_and_folder_that_it_names_is_there() -> None:
    for name in re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?|[A-Z]+\.md)`", README):
        assert (ROOT / name).exists(), name
