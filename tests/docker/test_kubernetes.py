"""Kubernetes' objects: by its own schemas, confined, probed, with time to stop, and naming only what is there."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from embedq.worker import WorkerSettings
from tests.docker.files import DOCKER, MANIFESTS, manifests, pod_specs

K8S = DOCKER / "k8s"
PODS = dict(pod_specs())


@pytest.mark.parametrize("manifest", list(manifests()), ids=lambda manifest: str(manifest["kind"]))
def test_an_object_is_as_kubernetes_wants_it(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS.keys())
def test_a_pod_is_confined_bounded_and_probed(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    # Else the services' own variables, EMBEDQ_REDIS_PORT and the like, would stand among our options.
    assert pod["enableServiceLinks"] is False
    for container in pod["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {"data"} if "redis" in container["name"] else set()
        assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed


def test_a_worker_has_more_time_to_stop_than_it_takes() -> None:
    (config,) = manifests(K8S / "base" / "configmap.yaml")
    grace_s = float(config["data"]["EMBEDQ_GRACE_S"])
    assert grace_s == WorkerSettings().grace_s
    assert PODS["embedq-worker"]["terminationGracePeriodSeconds"] >= grace_s + 5


def test_passwords_are_files_of_the_example_secret() -> None:
    (secret,) = manifests(K8S / "redis" / "secret.example.yaml")
    for name in ("embedq-worker", "embedq-exporter"):
        for volume in PODS[name]["volumes"]:
            for item in volume.get("secret", {}).get("items", ()):
                assert item["key"] in secret["stringData"]


def test_a_kustomization_names_files_that_are_there() -> None:
    for path in K8S.glob("*/kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        files = [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", ()))]
        for generator in kustomization.get("configMapGenerator", ()):
            files += [file.rpartition("=")[2] for file in generator["files"]]
        assert all((path.parent / file).exists() for file in files), path


def test_what_scales_and_what_is_patched_is_the_workers_deployment() -> None:
    (scaled,) = manifests(K8S / "autoscaling" / "scaled-object.yaml")
    (patch,) = manifests(K8S / "gpu" / "worker.yaml")
    assert scaled["spec"]["scaleTargetRef"]["name"] == patch["metadata"]["name"] == "embedq-worker"
    assert any(manifest["kind"] == "Deployment" for manifest in manifests(*MANIFESTS))
