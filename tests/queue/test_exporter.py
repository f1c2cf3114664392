"""`embedq exporter`: what it tells Prometheus, and how it takes outages, signals and what it may not see."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from embedq.producer import EmbedQueue, exporter, keys
from embedq.producer.connection import connect
from embedq.producer.errors import ConfigurationError
from embedq.worker.cli import main
from embedq.worker.redis_server import RedisServer, free_port
from tests.conftest import until
from tests.queue.planted import plant_worker
from tests.queue.test_worker import EMBEDQ

Samples = dict[tuple[str, ...], float]


def scrape(port: int) -> Samples:
    """(name, label values by label names) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
        text = reply.read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "FRESH_S", 0.0)


@pytest.fixture
def client(each_url: str) -> Iterator[Any]:
    with connect(each_url) as client:
        yield client


@pytest.mark.usefixtures("no_cache")
def test_queues_fleet_and_redis_are_told_with_their_units(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue(["a", "b", "c"])
        queue.enqueue_in(100, "later")
    client.zadd(keys.parked("embed"), {"x": 2})
    plant_worker(client, "w", tokens_per_s=10.0, tokens_per_byte=1.0)
    plant_worker(client, "odd", state="dancing\n", queues="other")
    plant_worker(client, "gone", silent_s=1000)
    client.sadd(keys.QUEUES, keys.queue('a "quoted"\nname'))
    client.set(keys.SUSPENDED, 1)
    client.config_set("maxmemory", 10**9)
    with exporter.serving(client, "127.0.0.1", 0) as port:
        told = scrape(port)
    client.config_set("maxmemory", 0)
    by_status = {status: told["embedq_queue_jobs", "embed", status] for status in exporter.STATUSES}
    assert by_status == dict.fromkeys(exporter.STATUSES, 0) | {"queued": 1, "scheduled": 1, "parked": 1}
    assert told["embedq_queue_texts", "embed"] == 3
    tokens = told["embedq_queue_tokens", "embed"]
    assert tokens == client.hstrlen(keys.job(client.lindex(keys.queue("embed"), 0).decode()), "data")
    assert told["embedq_queue_backlog_seconds", "embed"] == tokens / 10
    assert told["embedq_fleet_tokens_per_second", "embed"] == 10
    assert 0 <= told["embedq_queue_oldest_job_age_seconds", "embed"] < 60
    states = {state: told["embedq_fleet_workers", state] for state in exporter.STATES}
    assert states == dict.fromkeys(exporter.STATES, 0) | {"busy": 1, "lost": 1, "other": 1}
    assert told["embedq_redis_up",] == told["embedq_suspended",] == 1
    assert told["embedq_redis_used_memory_bytes",] > 100_000
    assert told["embedq_redis_max_memory_bytes",] == 10**9
    assert told["embedq_queue_jobs", 'a "quoted"\nname', "queued"] == 0
    assert told["process_resident_memory_bytes",] > 0


def test_scrapes_in_one_second_share_one_look(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "FRESH_S", 1000.0)
    with exporter.serving(client, "127.0.0.1", 0) as port:
        client.config_resetstat()
        for _ in range(5):
            scrape(port)
    assert client.info("commandstats")["cmdstat_smembers"]["calls"] == 2


@pytest.mark.usefixtures("no_cache")
def test_an_outage_is_told_and_ends_when_redis_is_back(short_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port_of_redis = free_port()
    url = f"redis://127.0.0.1:{port_of_redis}/0"
    with connect(url) as client, exporter.serving(client, "127.0.0.1", 0) as port:
        for _ in range(3):
            assert scrape(port)["embedq_redis_up",] == 0
        with RedisServer(short_path, port=port_of_redis):
            client.sadd(keys.QUEUES, keys.queue("embed"))
            told = scrape(port)
            assert (told["embedq_redis_up",], told["embedq_queue_jobs", "embed", "queued"]) == (1, 0)
        told = scrape(port)
        assert told["embedq_redis_up",] == 0
        assert ("embedq_queue_jobs", "embed", "queued") not in told
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2  # one an outage
    assert not any(record.exc_info for record in warnings)


def test_a_port_that_is_taken_and_a_host_that_is_none_are_errors(url: str) -> None:
    with connect(url) as client, exporter.serving(client, "127.0.0.1", 0) as port:
        for host, bad_port in (("127.0.0.1", port), ("no such host", 0)):
            with (
                pytest.raises(ConfigurationError, match=rf"metrics cannot be served on {host}:{bad_port}"),
                exporter.serving(client, host, bad_port),
            ):
                raise AssertionError("it was served")


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "embedq.producer.exporter")
    monkeypatch.delattr("embedq.producer.exporter")
    shown = CliRunner().invoke(main, ["exporter", "--url", url])
    assert shown.exit_code == 2
    assert shown.output == (
        "error: prometheus_client is not installed, which the exporter needs: pip install 'embedq[metrics]'\n"
    )


@contextmanager
def exporting(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [*EMBEDQ, "exporter", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_also_while_redis_is_away(number: signal.Signals) -> None:
    port = free_port()
    with exporting("--url", "redis://127.0.0.1:1/0", "--port", str(port)) as process:
        assert process.stderr is not None
        assert "on http://127.0.0.1" in process.stderr.readline()
        assert "waiting for Redis" in process.stderr.readline()
        assert scrape(port)["embedq_redis_up",] == 0
        began_at = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert time.monotonic() - began_at < 20
    assert "Traceback" not in said


def test_credentials_that_redis_refuses_end_it_with_one_line(short_path: Path) -> None:
    configuration = short_path / "redis.conf"
    configuration.write_text("user default off\nuser embedq on >s3cret ~* &* +@all\n")
    server = ServerThatLetsNobodyIn(short_path, port=0, configuration=configuration)
    with server, exporting("--url", f"redis://embedq:hunter2@127.0.0.1:{server.port}/0", "--port", "0") as process:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 5
    assert said.splitlines()[-1].startswith(f"error: Redis at 127.0.0.1:{server.port}/0 refuses these credentials")
    assert "hunter2" not in said


class ServerThatLetsNobodyIn(RedisServer):
    def _await_ready(self) -> None:
        def answers() -> bool:
            self.check()
            with connect(f"redis://embedq:s3cret@127.0.0.1:{self.port}/0") as client:
                try:
                    return bool(client.ping())
                except Exception:
                    return False

        until(answers)
