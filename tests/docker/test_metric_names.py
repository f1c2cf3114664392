"""Every metric that the dashboard, the rules and the autoscaler ask for is one that our code tells Prometheus."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docker.files import DOCKER, manifests

DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "embedq.json").read_text())
RULES = (DOCKER / "prometheus" / "rules.yaml").read_text()
_METRIC = re.compile(r"(?<![\w:])embedq_[a-z0-9_]+")
#: What a sample's name has behind its family's.
_SUFFIXES = ("_total", "_bucket", "_sum", "_count", "_info")


def _names_in_code() -> set[str]:
    """All strings in our packages that may be a metric's name: families may leave out what samples end in."""
    folders = (DOCKER.parent / folder for folder in ("producer", "worker"))
    trees = (ast.parse(path.read_text()) for folder in folders for path in folder.rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, str) and _METRIC.fullmatch(node.value)}


KNOWN = _names_in_code()
#: Fields of hashes in Redis, and an error's code, which look alike.
NO_METRICS = {
    *("embedq_attempts", "embedq_device", "embedq_error", "embedq_figures", "embedq_max_batch_tokens"),
    *("embedq_revision", "embedq_traceparent", "embedq_tracestate"),
}


def _expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel.get("targets", ())]


def _asked() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for expression in _expressions(panel):
            yield from ((panel["title"], name) for name in _METRIC.findall(expression))
    for variable in DASHBOARD["templating"]["list"]:
        yield from ((variable["name"], name) for name in _METRIC.findall(json.dumps(variable["query"])))
    for expression in re.findall(r"expr: (?:\|\n)?((?:.|\n)*?)(?=\n +(?:for|labels|- )|\Z)", RULES):
        yield from (("rules", name) for name in _METRIC.findall(expression))
    for manifest in manifests(DOCKER / "k8s" / "autoscaling" / "scaled-object.yaml"):
        for trigger in manifest["spec"]["triggers"]:
            yield from (("KEDA", name) for name in _METRIC.findall(trigger["metadata"]["query"]))


@pytest.mark.parametrize(("where", "name"), sorted(set(_asked())))
def test_a_metric_that_is_asked_for_is_one_of_ours(where: str, name: str) -> None:
    names = {name} | {name.removesuffix(suffix) for suffix in _SUFFIXES}
    assert names & KNOWN


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_the_dashboards_panels_lie_side_by_side_and_have_ids_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= covered
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_alert_is_tried_where_it_must_fire_and_where_it_must_not() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", RULES))
    tried = (DOCKER / "prometheus" / "rules.test.yaml").read_text()
    quiet, *troubles = tried.split("  - name: ")[1:]
    assert set(re.findall(r"alertname: (\w+)", quiet)) == alerts
    fires = re.findall(r"alertname: (\w+)\n\s+exp_alerts:", "".join(troubles))
    assert set(fires) == alerts


def test_the_files_that_are_read_for_names_are_there() -> None:
    assert (Path(__file__).parents[2] / "producer" / "exporter.py").exists()
    assert "embedq_queue_backlog_seconds" in KNOWN


def test_the_list_of_metrics_has_all_of_them_and_no_others() -> None:
    listed = _METRIC.findall((DOCKER / "METRICS.md").read_text())
    assert _families(listed) == _families(KNOWN - NO_METRICS)


def _families(names: Iterable[str]) -> set[str]:
    return {name.removesuffix("_total").removesuffix("_info") for name in names}
