"""The Dockerfile: hadolint's rules, and what must agree with other files."""

from __future__ import annotations

import re
import subprocess
import tomllib

from tests.docker.files import DOCKER

ROOT = DOCKER.parent
TEXT = (DOCKER / "Dockerfile").read_text()
#: Each stage's name, what it begins with and its lines.
STAGES = {
    name: (base, body)
    for base, name, body in re.findall(r"^FROM (\S+) AS (\S+)\n((?:(?!^FROM ).*\n)*)", TEXT, re.MULTILINE)
}


def _all_lines(stage: str) -> str:
    base, body = STAGES[stage]
    return (_all_lines(base) if base in STAGES else "") + body


def test_hadolint_is_content(hadolint: str) -> None:
    checked = subprocess.run(
        [hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_the_images_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ARG VERSION={project['version']}\n" in TEXT


def test_what_is_shipped_has_no_compiler_and_does_not_run_as_root() -> None:
    for image in ("cpu", "cuda", "cpu-with-model", "cuda-with-model", "rq-dashboard"):
        lines = _all_lines(image)
        assert "apt-get" not in lines
        assert "pip " not in lines
        assert re.findall(r"^USER (.+)$", lines, re.MULTILINE)[-1] == "10001:10001"
        assert "STOPSIGNAL SIGTERM" in lines


def test_everything_that_is_copied_reaches_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_the_requirements_of_the_dashboard_are_pinned() -> None:
    lines = (DOCKER / "rq-dashboard" / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))
