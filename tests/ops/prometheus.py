"""A Prometheus of the drill's own, with the configuration that ships and the drill's targets.

Knows its command line and its HTTP API; knows no metric by name.
"""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from embedq.worker.redis_server import free_port
from tests.ops.places import ROOT, Served

CONFIGURATION = ROOT / "docker/prometheus/prometheus.yaml"
#: Seconds between two scrapes, and two evaluations of the rules: a drill is short.
SCRAPE_EVERY_S = 1
#: Seconds for an answer.
QUERY_TIMEOUT_S = 20.0
#: Points of a range.
POINTS = 300


def find_binary() -> str | None:
    return shutil.which("prometheus")


def adapted(configuration: Path, targets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The configuration with these targets by job, and a drill's pace; jobs without targets are left out.

    Raises ValueError for a job that it does not have.
    """
    found: dict[str, Any] = yaml.safe_load(configuration.read_text())
    jobs = {job["job_name"]: job for job in found["scrape_configs"]}
    if unknown := targets.keys() - jobs.keys():
        raise ValueError(f"{configuration} has no jobs {sorted(unknown)}, only {sorted(jobs)}")
    found["global"] |= {"scrape_interval": f"{SCRAPE_EVERY_S}s", "scrape_timeout": f"{SCRAPE_EVERY_S}s"}
    found["global"]["evaluation_interval"] = f"{SCRAPE_EVERY_S}s"
    found["rule_files"] = [str(configuration.parent / name) for name in found.get("rule_files", [])]
    found["scrape_configs"] = [_aimed(jobs[name], of_job) for name, of_job in targets.items()]
    return found


def _aimed(job: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    kept = {key: value for key, value in job.items() if not key.endswith("_sd_configs")}
    return {**kept, "static_configs": [{"targets": list(targets)}]}


class Prometheus(Served):
    """Ready when it serves."""

    def __init__(self, binary: str, folder: Path, targets: Mapping[str, Sequence[str]]) -> None:
        port = free_port()
        configuration = folder / "prometheus.yaml"
        configuration.write_text(yaml.safe_dump(adapted(CONFIGURATION, targets)))
        command = [binary, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'prometheus'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        super().__init__("prometheus", command, folder, port, ready_path="/-/ready")

    def series(self, query: str, first: float, last: float) -> list[dict[str, Any]]:
        """Of a span, by the server's clock. Raises ValueError for a query that it does not understand."""
        step = max(SCRAPE_EVERY_S, (last - first) / POINTS)
        found: list[dict[str, Any]] = self._get(
            "/api/v1/query_range", {"query": query, "start": first, "end": last, "step": step}
        )["result"]
        return found

    def label_values(self, label: str, metric: str) -> list[str]:
        found: list[str] = self._get(f"/api/v1/label/{label}/values", {"match[]": metric})
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("/api/v1/rules", {})["groups"] for rule in group["rules"]]

    def targets_down(self) -> list[str]:
        """With the reason."""
        targets = self._get("/api/v1/targets", {})["activeTargets"]
        return [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]

    def _get(self, path: str, parameters: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=QUERY_TIMEOUT_S)
        try:
            connection.request("GET", f"{path}?{urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]
