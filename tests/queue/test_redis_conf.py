"""The redis.conf that ships: every supported server takes it, and keeps a job in less memory than by its defaults."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from embedq.producer.connection import connect
from embedq.worker.redis_server import CONFIGURATION, RedisServer
from tests.bench.queue_memory import job_bytes
from tests.conftest import redis_binaries

#: Enough that what a server needs for itself doesn't show.
NUM_JOBS = 2000


def _settings(server: RedisServer) -> dict[str, str]:
    with connect(server.url, decode_responses=True) as client:
        return dict(client.config_get("*"))


def test_each_line_of_it_is_in_force(each_redis_server: RedisServer) -> None:
    """But whether data is kept, which whoever starts the server decides."""
    found = _settings(each_redis_server)
    lines = [line for line in CONFIGURATION.read_text().splitlines() if line and not line.startswith("#")]
    wanted = dict(line.split(maxsplit=1) for line in lines)
    assert wanted.pop("appendonly") == "yes"
    assert wanted.pop("save") == '""'
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("binary", redis_binaries())
def test_a_server_of_ones_own_starts_with_it_alone(binary: str, short_path: Path) -> None:
    alone = short_path / "redis.conf"
    shutil.copy(CONFIGURATION, alone)
    with RedisServer(short_path / "data", binary=binary, durable=True, configuration=alone) as server:
        found = _settings(server)
    assert (found["appendonly"], found["save"], found["maxmemory-policy"]) == ("yes", "", "noeviction")


@pytest.mark.slow
@pytest.mark.parametrize("binary", redis_binaries())
def test_jobs_take_less_memory_than_by_the_servers_defaults(binary: str) -> None:
    ours = job_bytes(binary, CONFIGURATION, "float16", NUM_JOBS)
    default = job_bytes(binary, None, "float16", NUM_JOBS)
    assert ours.queued < 0.6 * default.queued
    assert ours.finished < 0.8 * default.finished
