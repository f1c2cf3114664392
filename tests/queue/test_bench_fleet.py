"""What simulates fleets: its arithmetic, its workers on a real server, and that all of it runs at a tiny scale."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq.producer import EmbedQueue, keys
from embedq.producer.connection import connect
from embedq.worker.redis_server import RedisServer
from tests.bench import fleet_idle, fleet_jobs, fleet_load, fleet_meters, fleet_plot, fleet_simulation
from tests.bench.fleet_jobs import DTYPES, QUEUE, Kind
from tests.bench.fleet_model import Call, JobCost, memory_bytes, plan, utilisation, wait_s
from tests.bench.fleet_plot import NoMatplotlibError, draw
from tests.bench.fleet_rates import CORPORA, RATES, SHORT, Rate, texts_per_batch, texts_per_s
from tests.bench.fleet_shards import largest_share
from tests.bench.fleet_simulation import Scale, Simulation, report
from tests.bench.fleet_tables import median_cost

#: 100 µs a job: 10,000 jobs and 640,000 texts a second fill a server.
COST = JobCost(64, "float16", 10, 60, 30, 1000, 500, 4000, 20_000)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's CPU clock is Linux'")


@pytest.fixture
def server(short_path: Path) -> Iterator[RedisServer]:
    with RedisServer(short_path / "redis", port=0) as server:
        yield server


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_meters, "SETTLE_S", 0.01)
    monkeypatch.setattr(fleet_load, "WARM_UP_S", 0.05)
    monkeypatch.setattr(fleet_idle, "WAKE_S", 0.3)


def test_a_server_is_full_when_its_seconds_a_second_come_to_one() -> None:
    assert COST.total_us == 100
    assert COST.jobs_per_s == pytest.approx(10_000)
    assert COST.texts_per_s == pytest.approx(640_000)
    assert COST.megabytes_per_s == pytest.approx(15)
    assert COST.utilisation(320_000) == pytest.approx(0.5)
    assert COST.devices(64_000) == pytest.approx(10)
    assert COST.devices(64_000, ceiling=0.6) == pytest.approx(6)


def test_memory_is_rate_times_time_to_live() -> None:
    assert memory_bytes(COST, 6400, 60) == pytest.approx(100 * 60 * 20_000)


def test_waits_are_those_of_a_queue_with_one_server() -> None:
    assert wait_s([Call(0.5, 1.0)]) == pytest.approx(0.5)  # calls that take equally long
    assert wait_s([Call(0.8, 1.0)]) == pytest.approx(2.0)
    # One long call in ten makes the others wait: E[S²] is what counts.
    assert wait_s([Call(9, 0.01), Call(1, 0.31)]) == pytest.approx((9 * 1e-4 + 0.31**2) / (2 * 0.6))
    assert utilisation([Call(9, 0.01), Call(1, 0.31)]) == pytest.approx(0.4)
    assert wait_s([Call(2, 0.5)]) == math.inf


def test_a_plan_has_as_many_servers_as_the_ceiling_asks_for() -> None:
    found = plan(64e6, 64_000, 20, COST, result_ttl_s=10, window_texts=6400, ceiling=0.6)
    assert found.texts_per_s == 1_280_000
    assert found.seconds == pytest.approx(50)
    assert found.jobs == pytest.approx(1e6)
    assert found.num_servers == 4  # 2 servers' worth of work at 60% each
    assert found.utilisation == pytest.approx(0.5)
    assert found.megabytes_per_s == pytest.approx(20_000 * 1500 / 1e6)
    assert found.left_bytes == pytest.approx(20_000 * 10 * 20_000)
    assert found.drained_bytes == pytest.approx(100 * 20_000)


def test_results_of_a_short_run_are_no_more_than_its_texts() -> None:
    assert plan(6400, 64_000, 1, COST).left_bytes == pytest.approx(100 * 20_000)


def test_rates_are_ordered_and_say_where_they_are_from() -> None:
    rates = [rate.tokens_per_s for rate in RATES]
    assert rates == sorted(rates)
    assert all(1e5 < rate < 1e7 for rate in rates)
    assert "TensorRT" in RATES[0].source
    assert "MLPerf" in RATES[-1].source
    assert [corpus.tokens for corpus in CORPORA] == [45, 250]
    assert texts_per_s(Rate("", 4.5e6, ""), SHORT) == pytest.approx(100_000)
    assert texts_per_batch(45) == 364
    assert texts_per_batch(10**9) == 1


def test_costs_are_medians_field_by_field() -> None:
    others = [JobCost(64, "float16", n, 60 - n, 30, 1000, 500, 4000, 20_000) for n in (11, 12, 50)]
    assert median_cost([COST, *others[:2]]).enqueue_us == 11
    assert median_cost([COST, *others[:2]]).work_us == 49


@pytest.mark.parametrize("precision", DTYPES)
def test_simulated_workers_leave_results_that_clients_read(
    server: RedisServer, precision: fleet_jobs.Precision
) -> None:
    kind = Kind(8, precision)
    with EmbedQueue(server.url) as queue:
        some = fleet_jobs.jobs(kind, 3)
        fleet_jobs.enqueue(queue, some)
        fleet_load.work_off([server.url], kind, num_workers=2)
        found = queue.results([one.job_id for one in some], timeout=5)
    assert {one.vectors.shape for one in found.values()} == {(8, 768)}
    assert {one.vectors.dtype.str for one in found.values()} == {DTYPES[precision]}


@pytest.mark.usefixtures("in_a_hurry")
def test_what_a_job_costs_is_measured_from_its_beginning_to_its_deletion(server: RedisServer) -> None:
    kind = Kind(8)
    found = fleet_load.job_cost(server, kind, 64)
    assert (found.texts, found.precision) == (8, "float32")
    assert min(found.enqueue_us, found.work_us, found.read_us) > 0
    # In base64, in and out again.
    assert 4 / 3 * kind.vector_bytes < found.bytes_in < 2 * kind.vector_bytes
    assert 4 / 3 * kind.vector_bytes < found.bytes_out < 2 * kind.vector_bytes
    assert found.queued_bytes < found.finished_bytes
    assert found.finished_bytes > 4 / 3 * kind.vector_bytes
    with connect(server.url) as client:
        assert client.dbsize() == 0


@pytest.mark.usefixtures("in_a_hurry")
def test_workers_keep_the_pace_of_their_devices(server: RedisServer) -> None:
    found = fleet_load.pace(server, Kind(64), num_workers=3, cycle_s=0.2, seconds=1.0, most_jobs_per_s=1000)
    batch = fleet_load.batch_jobs(Kind(64))
    assert 0 < found.jobs_per_s < 2 * 3 * batch / 0.2
    assert found.claim_s > 0
    assert found.publish_s > 0
    assert found.cpu_us > 0


@pytest.mark.usefixtures("in_a_hurry")
def test_one_job_for_an_idle_fleet_is_claimed_once(server: RedisServer) -> None:
    [found] = fleet_idle.wake(server, num_workers=3, rounds=1)
    assert 1 <= found.num_woken <= 3
    assert 0 < found.claimed_after_s < 30
    with connect(server.url) as client:
        assert client.llen(keys.queue(QUEUE)) == 0


def test_the_hash_spreads_jobs_evenly() -> None:
    assert 1 <= largest_share(20_000, 4) < 1.1


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_hurry")
def test_the_whole_simulation_runs_at_a_tiny_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fleet_simulation, "TEXTS", (1, 8, 64))
    monkeypatch.setattr(fleet_simulation, "SPREAD_IDS", 1000)
    scale = Scale(rounds=1, texts=256, jobs=32, seconds=2.0, idle_seconds=0.1, wakes=1, real_workers=1)
    found = Simulation(scale, max_workers=2).run()
    text = report(found, "# Fleets")
    for part in (
        "Opened up",
        "modelled pace",
        "under load",
        "nothing to do",
        "Several servers",
        "10 billion sentences",
    ):
        assert part in text
    assert "nan" not in text
    draw(found, tmp_path / "fleet.svg")
    assert "H100s" in (tmp_path / "fleet.svg").read_text()


def test_without_matplotlib_there_is_a_clear_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NoMatplotlibError, match=r"pip install 'embedq\[bench\]'"):
        fleet_plot.draw(fleet_simulation.Found(), tmp_path / "fleet.svg")
