"""What the drill rests on: scrapes, moves, gaps, the dashboard's queries, the report."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from embedq.producer.http_endpoints import Answer, HttpEndpoints, Page
from tests.ops.audit import Account
from tests.ops.charts import page
from tests.ops.dashboards import Query, label_queries, read_queries
from tests.ops.finding import Finding
from tests.ops.load import LARGE_EVERY, LARGE_TEXTS, texts_of
from tests.ops.moves import Watch, becomes, less, more
from tests.ops.places import Served
from tests.ops.prometheus import CONFIGURATION, adapted
from tests.ops.report import markdown
from tests.ops.scrape import Metrics, get

BEFORE = 'embedq_jobs_total{queue="a"} 1\nembedq_jobs_total{queue="b"} 2\nembedq_ready 1\n'
AFTER = 'embedq_jobs_total{queue="a"} 4\nembedq_jobs_total{queue="b"} 2\nembedq_ready 0\n'


class Told(Served):
    """A place that says what it is told to."""

    def __init__(self, *pages: str) -> None:
        self._pages = list(pages)

    @property
    def is_running(self) -> bool:
        return len(self._pages) > 0

    def metrics(self) -> Metrics:
        return Metrics.parse(self._pages.pop(0) if len(self._pages) > 1 else self._pages[0])


def test_samples_are_added_up_over_labels_and_processes() -> None:
    scraped = Metrics.parse(BEFORE) + Metrics.parse(AFTER)
    assert scraped.value("embedq_jobs_total") == 9
    assert scraped.value("embedq_jobs_total", queue="a") == 5
    assert scraped.value("embedq_jobs_total", queue="c") == 0
    assert scraped.names == {"embedq_jobs_total", "embedq_ready"}


def test_what_moves_as_it_must_is_told_from_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ops.moves.SHOWS_WITHIN_S", 0.2)
    finding = Finding("", [])
    watch = Watch(finding)
    moves = [more("embedq_jobs_total", queue="a"), more("embedq_jobs_total", queue="b"), becomes(0, "embedq_ready")]
    with watch.expecting("a cause", [Told(BEFORE, AFTER)], *moves, less("embedq_ready")):
        pass
    assert [(row.what, row.found, row.is_good) for row in finding.rows] == [
        ('embedq_jobs_total{queue="a"}', "1 -> 4", True),
        ('embedq_jobs_total{queue="b"}', "2 -> 2", False),
        ("embedq_ready", "1 -> 0", True),
        ("embedq_ready", "1 -> 0", True),
    ]
    assert watch.moved == watch.seen == {"embedq_jobs_total", "embedq_ready"}


def test_scrapes_at_the_same_time_are_all_answered() -> None:
    def answer(_accept: str) -> Answer:
        time.sleep(0.001)
        return Answer(200, b"embedq_ready 1\n")

    found: list[int] = []
    endpoints = HttpEndpoints("127.0.0.1", 0, {"/metrics": Page(answer, is_slow=True)})
    endpoints.start()
    try:
        scrapers = [
            threading.Thread(target=lambda: found.extend(get(endpoints.port, "/metrics").status for _ in range(40)))
            for _ in range(4)
        ]
        for scraper in scrapers:
            scraper.start()
        for scraper in scrapers:
            scraper.join()
    finally:
        endpoints.close()
    assert found == [200] * 160


def test_nobody_answering_is_no_metrics() -> None:
    assert get(1, "/metrics").status == 0


def test_the_longest_gap_reaches_from_the_first_moment_to_the_last() -> None:
    account = Account(3, finished_at=[0.5, 1.0, 3.0, 9.0])
    assert account.largest_gap_s(0.0, 4.0) == 2.0
    assert account.largest_gap_s(1.0, 8.0) == 5.0
    assert account.largest_gap_s(4.0, 8.0) == 4.0
    assert account.per_s(0.0, 4.0) == 0.75


def test_a_job_counts_for_the_process_whose_id_is_in_its_workers_name() -> None:
    account = Account(3, by_worker={"host.12.ab": 2, "host.123.cd": 1})  # type: ignore[arg-type]
    assert (account.num_done_by([12]), account.num_done_by([123, 12]), account.num_done_by([1])) == (2, 3, 0)


def test_a_jobs_texts_follow_from_its_id() -> None:
    assert texts_of("load-7") == texts_of("load-7") != texts_of("load-8")
    assert [len(texts_of(f"load-{number}")) for number in range(LARGE_EVERY)] == [1] * (LARGE_EVERY - 1) + [LARGE_TEXTS]


def dashboard(folder: Path, expr: str) -> Path:
    variable = {"name": "queue", "type": "query", "definition": "label_values(embedq_queue_jobs, queue)"}
    panel = {"id": 2, "title": "Jobs", "targets": [{"expr": expr, "legendFormat": "{{queue}}"}]}
    written = folder / "dashboard.json"
    content = {"templating": {"list": [variable]}, "panels": [{"id": 1, "title": "a row", "panels": [panel]}]}
    written.write_text(json.dumps(content))
    return written


def test_the_dashboards_variables_are_replaced(tmp_path: Path) -> None:
    found = dashboard(tmp_path, 'rate(a{queue=~"$queue",b=~"${queue:regex}"}[$__rate_interval])')
    assert [query.expr for query in read_queries(found)] == ['rate(a{queue=~".*",b=~".*"}[15s])']
    assert list(label_queries(found)) == [("embedq_queue_jobs", "queue")]
    with pytest.raises(KeyError, match="unknown"):
        read_queries(dashboard(tmp_path, "$unknown"))


def test_prometheus_gets_the_shipped_configuration_with_other_targets() -> None:
    found = adapted(CONFIGURATION, {"embedq-worker": ["127.0.0.1:1"]})
    assert found["scrape_configs"] == [
        {"job_name": "embedq-worker", "static_configs": [{"targets": ["127.0.0.1:1"]}]},
    ]
    assert all(Path(name).exists() for name in found["rule_files"])
    with pytest.raises(ValueError, match="no jobs"):
        adapted(CONFIGURATION, {"another": []})


def test_a_chart_has_a_line_a_series_and_says_where_there_is_no_data() -> None:
    query = Query(1, "Jobs <b>", "jobs", "{{queue}}", "short")
    series = [{"metric": {"queue": "a"}, "values": [[0, "1"], [1, "NaN"], [2, "3"]]}]
    drawn = page([query], lambda _: series)
    assert drawn.count("<polyline") == 1
    assert "Jobs &lt;b&gt;" in drawn
    assert "no data" in page([query], lambda _: [])


def test_the_report_shows_what_is_not_as_it_must_be() -> None:
    finding = Finding("An exercise", ["What was done."])
    finding.check("good", "1", "some", True)
    finding.check_at_most("late", 3.0, 2.0)
    finding.check_none("lost", ["a", "b"])
    told = markdown([finding], "7.0")
    assert "## An exercise" in told
    assert "**not at most 2 s**" in told
    assert "2, such as a, b" in told
    assert [row.what for row in finding.bad] == ["late", "lost"]
