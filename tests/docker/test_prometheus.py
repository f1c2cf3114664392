"""Prometheus' own tool on its configuration, and on what each alert does."""

from __future__ import annotations

import subprocess

import pytest

from tests.docker.files import DOCKER


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yaml"), ("check", "rules", "rules.yaml"), ("test", "rules", "rules.test.yaml")],
    ids=" ".join,
)
def test_promtool_is_content(promtool: str, arguments: tuple[str, ...]) -> None:
    checked = subprocess.run(
        [promtool, *arguments], cwd=DOCKER / "prometheus", capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
