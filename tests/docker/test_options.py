"""Every command, option and variable of embedq that container files use is one that the command line has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
import pytest

from embedq.producer import password_file
from embedq.worker.cli import main
from embedq.worker.supervision.invocation import INHERITED_VARIABLES
from tests.docker.files import COMPOSE_FILES, DOCKER, compose, manifests, pod_specs


def _parameters(command: click.Command) -> Iterator[click.Parameter]:
    yield from command.params
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _parameters(inner)


VARIABLES = {str(parameter.envvar) for parameter in _parameters(main) if parameter.envvar} | {
    password_file.VARIABLE,
    *INHERITED_VARIABLES,
}


def _environments() -> Iterator[tuple[str, str]]:
    """Where each variable is set, and its name."""
    for path in COMPOSE_FILES:
        for name, service in compose(path)["services"].items():
            yield from ((f"{path.name}: {name}", variable) for variable in service.get("environment", {}))
    for name, spec in pod_specs():
        for container in spec["containers"]:
            yield from ((name, entry["name"]) for entry in container.get("env", ()))
    for patch in manifests(DOCKER / "k8s" / "gpu" / "worker.yaml"):
        for container in patch["spec"]["template"]["spec"]["containers"]:
            yield from (("gpu patch", entry["name"]) for entry in container["env"])
    for manifest in manifests(DOCKER / "k8s" / "base" / "configmap.yaml"):
        yield from (("configmap", variable) for variable in manifest["data"])
    for line in (DOCKER / "Dockerfile").read_text().splitlines():
        if not line.startswith("#"):
            yield from (("Dockerfile", variable) for variable in re.findall(r"\b(EMBEDQ_\w+)=", line))


USED = sorted({(where, name) for where, name in _environments() if name.startswith("EMBEDQ_")})


@pytest.mark.parametrize(("where", "variable"), USED)
def test_a_variable_of_ours_is_one_that_something_reads(where: str, variable: str) -> None:
    assert variable in VARIABLES


def _commands() -> Iterator[list[str]]:
    for path in COMPOSE_FILES:
        for service in compose(path)["services"].values():
            if str(service.get("image", "")).startswith("${EMBEDQ_IMAGE") and "command" in service:
                yield service["command"]
            check: Any = service.get("healthcheck", {}).get("test", ())
            if "embedq" in check:
                yield check[check.index("embedq") + 1 :]
    for name, spec in pod_specs():
        if name != "embedq-redis":
            yield from (container["args"] for container in spec["containers"])
    yield re.findall(r'"([^"]+)"', (DOCKER / "Dockerfile").read_text().split("HEALTHCHECK ")[1].splitlines()[0])[1:]


@pytest.mark.parametrize("words", list(_commands()), ids=" ".join)
def test_a_command_and_its_options_are_those_of_the_command_line(words: list[str]) -> None:
    command = main.commands[words[0]]
    options = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in words[1:] if word.startswith("--")} <= options
