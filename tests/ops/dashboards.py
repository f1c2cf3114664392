"""The Grafana dashboard that ships: its panels' queries as Grafana would send them, and whether they have data.

Knows Grafana's JSON; whom it asks is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ops.finding import Finding
from tests.ops.places import ROOT
from tests.ops.prometheus import Prometheus

DASHBOARD = ROOT / "docker/grafana/dashboards/embedq.json"
#: What Grafana makes of its own variables with this drill's scrape interval, and a few minutes on the screen.
BUILT_IN = {"__rate_interval": "15s", "__interval": "5s", "__range": "5m"}
#: Metrics without data on a machine of this kind, and why.
WITHOUT_DATA = {"embedq_gpu_memory_bytes": "there is no GPU"}
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Query:
    panel_id: int
    panel: str
    #: with its variables replaced
    expr: str
    legend: str
    unit: str


def read_queries(dashboard: Path) -> list[Query]:
    """Of all panels. Raises KeyError for a variable that nobody defines."""
    found = json.loads(dashboard.read_text())
    values = {**BUILT_IN, **dict(_all_values(found))}
    return [query for panel in _panels(found) for query in _of_panel(panel, values)]


def label_queries(dashboard: Path) -> Iterator[tuple[str, str]]:
    """What fills the choices of its variables: metric and label."""
    for variable in json.loads(dashboard.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            if match is None:
                raise ValueError(f"{variable['definition']!r} is no list of a label's values")
            yield match[1], match[2]


def _all_values(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each variable with what stands for all its values."""
    for variable in dashboard["templating"]["list"]:
        yield variable["name"], variable.get("allValue") or ".*"


def _panels(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those in rows too."""
    for panel in node.get("panels", []):
        yield panel
        yield from _panels(panel)


def _of_panel(panel: Mapping[str, Any], values: Mapping[str, str]) -> Iterator[Query]:
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    for target in panel.get("targets", []):
        expr = _VARIABLE.sub(lambda match: values[match[1] or match[2]], target["expr"])
        yield Query(panel["id"], panel["title"], expr, target.get("legendFormat", ""), unit)


def ask_all(finding: Finding, prometheus: Prometheus, first: float, last: float) -> None:
    """Rows about the dashboard and the rules, of this span."""
    queries = read_queries(DASHBOARD)
    finding.tell("panels with queries, queries", f"{len({query.panel_id for query in queries})}, {len(queries)}")
    silent = [query for query in queries if not prometheus.series(query.expr, first, last)]
    explained = {name for query in silent for name in WITHOUT_DATA if name in query.expr}
    for name in sorted(explained):
        finding.tell(f"without data: {name}", WITHOUT_DATA[name])
    unexplained = [query for query in silent if not any(name in query.expr for name in explained)]
    finding.check_none("other queries without data", [f"{query.panel}: `{query.expr}`" for query in unexplained])
    empty = [label for metric, label in label_queries(DASHBOARD) if not prometheus.label_values(label, metric)]
    finding.check_none("variables without a value", empty)
    rules = prometheus.rules()
    finding.tell("rules that record or alert", len(rules))
    ill = [f"{rule['name']}: {rule.get('lastError', '')}" for rule in rules if rule["health"] != "ok"]
    finding.check_none("rules that could not be evaluated", ill)
