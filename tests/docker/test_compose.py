"""Compose files: as the specification wants them, confined, with time to stop, and without a password.

compose-spec.json is schema/compose-spec.json of https://github.com/compose-spec/compose-spec at commit
170098ba07d9f53c383a41bfd4c5166b0a4529a6 (Apache-2.0), unchanged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from embedq.worker import WorkerSettings
from tests.docker.files import COMPOSE_FILES, DOCKER, compose

SCHEMA = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
BASE = compose(DOCKER / "compose.yaml")
#: Of every file, the services that it starts, not those of the base which it changes.
SERVICES = {
    f"{path.name}: {name}": service
    for path in COMPOSE_FILES
    for name, service in compose(path)["services"].items()
    if path.name == "compose.yaml" or name not in BASE["services"]
}


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_a_file_is_as_the_compose_specification_wants_it(path: Path) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(compose(path))


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_a_service_is_confined_bounded_and_started_again(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["restart"] == "unless-stopped"
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert not service["image"].endswith(("latest", "latest}"))


def test_a_worker_has_more_time_to_stop_than_it_takes() -> None:
    worker = BASE["services"]["worker"]
    grace_s = float(worker["environment"]["EMBEDQ_GRACE_S"])
    assert grace_s == WorkerSettings().grace_s
    assert float(worker["stop_grace_period"].removesuffix("s")) >= grace_s + 5


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_no_password_stands_in_a_file_or_in_an_environment(path: Path) -> None:
    assert not re.search(r"://[^@/\s}]*:[^@/\s]*@", path.read_text())
    for service in compose(path)["services"].values():
        for name in service.get("environment", {}):
            assert "PASSWORD" not in name or name.endswith("_FILE")


def test_every_secret_that_is_named_is_made_by_the_script() -> None:
    made = re.search(r"for name in ([\w ]+); do", (DOCKER / "secrets.sh").read_text())
    assert made
    files = {
        Path(secret["file"]).name for path in COMPOSE_FILES for secret in compose(path).get("secrets", {}).values()
    }
    assert files == {f"{name}-password" for name in made[1].split()}


def test_what_is_mounted_from_the_repository_is_there() -> None:
    for path in COMPOSE_FILES:
        for config in compose(path).get("configs", {}).values():
            assert (DOCKER / config["file"]).is_file()
        for service in compose(path)["services"].values():
            for volume in service.get("volumes", ()):
                if volume.startswith("."):
                    assert (DOCKER / volume.split(":")[0]).is_dir()


def test_every_variable_that_may_be_set_has_a_default_and_stands_in_the_example() -> None:
    example = (DOCKER / ".env.example").read_text()
    for path in COMPOSE_FILES:
        for name, default in re.findall(r"\$\{(\w+)(:-[^}]+)?\}", path.read_text()):
            assert default, f"{name} of {path.name} has no default"
            assert re.search(rf"^#?{name}=", example, re.MULTILINE), f"{name} is not in .env.example"
