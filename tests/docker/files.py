"""Where the files for container platforms are, and how they are read. Knows YAML; judges nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE_FILES = sorted(DOCKER.glob("compose*.yaml"))
#: Objects of Kubernetes itself, whole: no kustomizations, no patches, no custom resources.
MANIFESTS = sorted(
    path
    for path in (DOCKER / "k8s").glob("*/*.yaml")
    if path.name != "kustomization.yaml" and path.parent.name not in ("gpu", "autoscaling", "monitoring")
)


class _ComposeLoader(yaml.SafeLoader):
    """Takes Compose's `!reset` and `!override` for what stands behind them."""


def _untagged(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    raise yaml.YAMLError(f"{node.tag} stands before something other than a list")


for _tag in ("!reset", "!override"):
    _ComposeLoader.add_constructor(_tag, _untagged)


def compose(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(path.read_text(), _ComposeLoader)
    return loaded


def manifests(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths or MANIFESTS:
        yield from yaml.safe_load_all(path.read_text())


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for manifest in manifests():
        if "template" in manifest.get("spec", {}):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]
