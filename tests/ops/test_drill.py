"""The drill in small: what it measures in minutes is looked for by hand, that it would find it is seen here.

No time that it measures fails a test: how fast the machine is decides nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from embedq.producer import JobFailedError
from tests.conftest import until
from tests.ops.charts import page
from tests.ops.dashboards import DASHBOARD, ask_all, read_queries
from tests.ops.finding import Finding
from tests.ops.prometheus import Prometheus, find_binary
from tests.ops.rolling import rolling_restart
from tests.ops.stand_in import harmful
from tests.ops.supervised import killed_process
from tests.ops.world import World

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


def be_silent(line: str) -> None:
    """Nobody reads along."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world", be_silent) as opened:
        yield opened


@pytest.fixture
def prometheus_binary() -> str:
    binary = find_binary()
    if binary is None:
        what = "no prometheus is installed (Debian's package has it)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what}, which CI must not miss")
        pytest.skip(what)
    return binary


def wrong(findings: Sequence[Finding]) -> list[str]:
    """But for what took too long."""
    return [str(row) for finding in findings for row in finding.bad if not row.wanted.startswith("at most")]


def test_a_fleet_is_restarted_under_load_and_no_job_is_lost(world: World) -> None:
    findings = rolling_restart(world, per_s=60.0, calm_s=0.5)
    assert wrong(findings) == []


def test_a_supervised_process_that_is_killed_is_replaced_and_its_jobs_are_done(world: World) -> None:
    assert wrong(killed_process(world, per_s=60.0)) == []


def test_a_text_that_hangs_a_worker_costs_its_job_an_attempt_when_the_worker_is_told_to_leave_at_once(
    world: World,
) -> None:
    with world.worker("hanging", "--liveness-timeout-s", "1") as worker:
        worker.await_ready()
        job = world.queue.enqueue(["innocent", harmful("hang")], retries=0)
        until(lambda: job.status() == "started")
        until(lambda: not worker.is_live())
        worker.signal(signal.SIGTERM)
        time.sleep(1.5)  # sooner they would count as one
        worker.signal(signal.SIGTERM)
        until(lambda: not worker.is_running)
    with pytest.raises(JobFailedError) as caught:
        job.result(timeout=0)
    assert caught.value.code == "hung"


def test_prometheus_understands_every_query_of_the_dashboard(world: World, prometheus_binary: str) -> None:
    exporter, worker = world.keep(world.exporter()), world.keep(world.worker("scraped"))
    targets = {
        "embedq-worker": [f"127.0.0.1:{worker.port}"],
        "embedq-exporter": [f"127.0.0.1:{exporter.port}"],
    }
    prometheus = world.keep(Prometheus(prometheus_binary, world.folder, targets))
    for place in (exporter, worker, prometheus):
        place.await_ready()
    first = time.time()
    world.queue.embed([f"text {number}" for number in range(100)])
    count = "sum(embedq_texts_total)"
    until(lambda: [one for one in prometheus.series(count, first, time.time()) if one["values"][-1][1] == "100"])
    until(lambda: not prometheus.targets_down())
    finding = Finding("dashboard", [])
    ask_all(finding, prometheus, first, time.time())
    [silent] = finding.bad  # what goes wrong, and a supervisor's
    assert silent.what == "other queries without data"
    drawn = page(read_queries(DASHBOARD), lambda query: prometheus.series(query, first, time.time()))
    assert drawn.count("<figure>") == len({query.panel_id for query in read_queries(DASHBOARD)})
