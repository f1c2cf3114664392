"""What the queue's part of `make bench` measures with: looks, meters, drains, loads and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq.producer import EmbedQueue
from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.bench import measure
from tests.bench.latency_proxy import LatencyProxy
from tests.bench.peer_environment import QUEUE_CONSTRAINTS, QUEUE_REQUIREMENTS
from tests.bench.queue_accounts import num_micro_batches, stage_seconds, starved_share, sum_of_shares
from tests.bench.queue_contenders import CONTENDERS, Contender, Progress
from tests.bench.queue_drain import Drained, Site
from tests.bench.queue_idle import idle
from tests.bench.queue_load import arrivals, loaded, percentile_ms
from tests.bench.queue_processes import Bench, Producer, QueuePeerError, WorkerProcess
from tests.bench.queue_tables import costs_table, rates_table, stages_text
from tests.conftest import until

BY_SYSTEM = {contender.system: contender for contender in CONTENDERS}
#: Those that run in this project's own environment.
INSTALLED = [contender.system for contender in CONTENDERS if contender.is_ours]
JOBS = 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's CPU clock is Linux'")


@pytest.fixture
def site(short_path: Path) -> Iterator[Site]:
    with RedisServer(short_path / "redis", port=0) as server:
        yield Site(Bench(Path(sys.executable), short_path), server)


@pytest.fixture
def contender(request: pytest.FixtureRequest) -> Contender:
    return BY_SYSTEM[request.param]


@pytest.fixture
def producer(site: Site, contender: Contender) -> Iterator[Producer]:
    producer = Producer(site.bench, contender, site.url())
    yield producer
    producer.close()


@pytest.mark.slow
@pytest.mark.parametrize("contender", INSTALLED, indirect=True)
def test_a_drain_counts_what_it_took_and_can_be_done_again(
    site: Site, contender: Contender, producer: Producer
) -> None:
    assert site.server.port is not None
    with LatencyProxy(site.server.port, 0.0) as proxy:
        for _ in range(2):  # the second time from the first one's keys
            found = site.drain(contender, producer, JOBS, texts_per_job=2, proxy=proxy)
            assert (found.num_jobs, found.num_texts) == (JOBS, 2 * JOBS)
            assert 0 < found.seconds < 60
            assert found.worker_cpu_s > 0
            assert found.redis_cpu_s > 0
            # RQ makes some twenty a job; ours some for all of them.
            assert found.num_round_trips > (1 if contender.system == "embedq" else 10 * JOBS)
            assert 10 < found.commands_per_job < 120


@pytest.mark.parametrize("contender", ["embedq"], indirect=True)
def test_commands_are_counted_without_those_that_look(site: Site, contender: Contender) -> None:
    with connect(site.url()) as client, WorkerProcess(site.bench, contender, site.url()) as worker:
        # The worker is not looked at before it waits.
        with EmbedQueue(site.url()) as queue:
            queue.enqueue("a text").result(timeout=30)
        client.config_resetstat()
        before = site._meters(worker, None)
        for _ in range(50):
            site.look(contender, 1)
        after = site._meters(worker, None)
    assert after.num_commands - before.num_commands < 20


@pytest.mark.parametrize("contender", ["embedq"], indirect=True)
def test_one_job_for_an_idle_worker_is_timed(
    site: Site, contender: Contender, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.queue_idle.WATCH_S", 0.2)
    monkeypatch.setattr("tests.bench.queue_idle.NUM_JOBS", 3)
    found = idle(site, contender, producer, 0.0)
    assert len(found.latencies_s) == 3
    assert all(0 < latency_s < 30 for latency_s in found.latencies_s)
    assert 0 <= found.worker_cpu < 2


@pytest.mark.parametrize("contender", ["embedq", "rq-simple"], indirect=True)
def test_jobs_that_come_by_chance_are_timed_each(
    site: Site, contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.queue_load.DURATION_S", 0.2)
    found = loaded(site, contender, drain_rate=50, shares=(0.5,))
    assert found.capacity > 0
    assert all(0 < latency_s < 60 for latency_s in found.latencies_s[0.5])
    with connect(site.url()) as client:
        assert client.config_get("notify-keyspace-events") == {"notify-keyspace-events": ""}


@pytest.mark.parametrize("contender", ["rq-simple"], indirect=True)
def test_a_worker_that_ends_by_itself_says_why(site: Site, contender: Contender) -> None:
    with (
        WorkerProcess(site.bench, contender, "redis://nowhere.invalid:1/0") as worker,
        pytest.raises(QueuePeerError, match=r"(?s)SimpleWorker ended with status 1.*nowhere"),
    ):
        until(worker.check)


def test_a_producer_that_fails_says_why(site: Site) -> None:
    with pytest.raises(QueuePeerError, match="No module named 'huey'"):
        Producer(site.bench, BY_SYSTEM["huey"], site.url())


@pytest.mark.parametrize(
    ("system", "answers", "progress"),
    [
        ("embedq", [10, 0], Progress(True, 0)),
        ("rq-simple", [9, 0], Progress(False, 0)),
        ("huey", [0, 10], Progress(False, 10)),
        ("arq", [10, 11, 0], Progress(True, 0)),
        ("arq", [10, 12, 1], Progress(True, 0)),  # its health is no job
        ("arq", [10, 13, 1], Progress(False, 0)),  # one runs
        ("arq", [4, 11, 1], Progress(False, 6)),
    ],
)
def test_a_look_tells_how_far_a_system_is(system: str, answers: list[int], progress: Progress) -> None:
    assert BY_SYSTEM[system].look.read(answers, 10) == progress


def test_micro_batches_are_counted_from_the_results(site: Site) -> None:
    assert sum_of_shares([1, 2, 2, 4, 4, 4, 4]) == pytest.approx(3)
    with EmbedQueue(site.url()) as queue, WorkerProcess(site.bench, BY_SYSTEM["embedq"], site.url()):
        for job in queue.enqueue_many(["one", "two", "three"]):
            job.result(timeout=30)
        with connect(site.url()) as client:
            batches = num_micro_batches(client)
    assert batches == pytest.approx(round(batches))
    assert 1 <= batches <= 3


def test_a_workers_account_of_its_time_is_read_from_its_last_words() -> None:
    device = "INFO device: encoding 1.5 s, starved 0.5 s (25.0 % of the time with work), idle 7.0 s; CPU: "
    logs = [
        f"INFO {device}claim 9 s\n{device}claim 1.25 s, tokenize 0.5 s\nINFO worker a: 3 jobs done\n",
        f"{device}claim 0.25 s, encode 1 s\n",
        "no account",
    ]
    assert stage_seconds(logs) == {"claim": 1.5, "tokenize": 0.5, "encode": 1.0}
    assert starved_share(logs) == 0.25
    assert stage_seconds(["no account"]) == {}
    assert starved_share(["no account"]) is None


def _drained(log: str = "", seconds: float = 2.0) -> Drained:
    return Drained(100, 100, seconds, 0.5, 0.25, 1000, 20, log)


def test_a_drains_figures_are_per_job() -> None:
    drained = _drained()
    assert (drained.jobs_per_s, drained.worker_us, drained.redis_us) == (50, 5000, 2500)
    assert (drained.commands_per_job, drained.round_trips_per_job) == (10, 0.2)


def test_tables_hold_medians_and_ratios() -> None:
    names = {"embedq": "embedq worker", "rq-simple": "rq SimpleWorker"}
    rates = rates_table("jobs/s", names, {"embedq": [90, 100, 400], "rq-simple": [10, 20, 30]})
    assert [cell.strip() for cell in rates.splitlines()[2].split("|")[1:-1]] == (
        ["embedq worker", "100", "90 to 400", "1.00", "5.00"]
    )
    assert rates.splitlines()[3].endswith("| 1.00               |")
    assert "5,000" in costs_table(8, names, {"embedq": [_drained(), _drained(), _drained()]})
    assert "did not tell" in stages_text([_drained()])
    assert stages_text([_drained("CPU: claim 0.001 s"), _drained("CPU: claim 0.003 s")]).endswith("claim 20 µs.")


def test_turns_are_taken_round_by_round() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) or name for name in ("a", "b")}
    assert measure.take_turns(candidates, {"a": 3, "b": 1}) == {"a": ["a"] * 3, "b": ["b"]}
    assert calls == ["a", "b", "a", "a"]


def test_percentiles_are_latencies_that_were_seen() -> None:
    seconds = [place / 1000 for place in range(1, 101)]
    assert [percentile_ms(seconds, percent) for percent in (50, 99, 100)] == [50, 99, 100]
    assert percentile_ms([0.007], 99) == 7


def test_jobs_come_at_the_rate_asked_for() -> None:
    times = arrivals(1000, 4.0)
    assert times == sorted(times)
    assert 3700 < len(times) < 4300
    assert arrivals(0.001, 1.0)


def test_every_requirement_of_the_queues_peers_is_pinned() -> None:
    lines = [line for line in QUEUE_CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0] for line in lines}
    assert {requirement.partition("[")[0] for requirement in QUEUE_REQUIREMENTS} <= pinned
