"""Which package may know what (the README's map), and what each one offers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import get_args

import pytest

import embedq.model.encoder
import embedq.producer.options

FORBIDDEN = {
    "embedq.producer": ["torch", "tokenizers", "transformers", "embedq.worker", "embedq.model"],
    "embedq.model": ["torch", "redis", "rq", "embedq.producer", "embedq.worker"],
    "embedq.model.sentence_encoder": ["redis", "rq", "embedq.producer", "embedq.worker", "transformers"],
    "embedq.worker": ["torch", "transformers"],
    "embedq.worker.cli": ["torch", "transformers"],
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_it_may_know(package: str) -> None:
    code = f"import json, sys, {package}; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = json.loads(shown.stdout)
    for name in FORBIDDEN[package]:
        assert not [module for module in loaded if module == name or module.startswith(name + ".")]


@pytest.mark.parametrize("package", ["embedq.producer", "embedq.model", "embedq.worker"])
def test_what_a_package_offers_is_there_sorted_and_ours(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name.lower())) or (
        module.__all__ == sorted(module.__all__)
    )
    for name in module.__all__:
        offered = getattr(module, name)
        assert getattr(offered, "__module__", package).startswith(("embedq.", "typing"))


def test_the_two_sides_of_the_wire_name_the_same_precisions_and_sides() -> None:
    """Neither package may import the other, so the names stand twice."""
    model, producer = embedq.model.encoder, embedq.producer.options
    assert get_args(model.Precision) == get_args(producer.Precision)
    assert get_args(model.TruncationSide) == get_args(producer.TruncationSide)
    assert get_args(model.Output) == get_args(producer.Output)
    assert model.TOKEN_PRECISIONS == producer.TOKEN_PRECISIONS


def test_an_unknown_name_of_the_model_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Encodr"):
        _ = embedq.model.Encodr  # type: ignore[attr-defined]


def test_a_worker_without_torch_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from embedq.worker.encoders import load_encoder\n"
        "from embedq.worker import WorkerSettings\n"
        "try: load_encoder(WorkerSettings())\n"
        "except Exception as err: print(type(err).__name__, err)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.startswith("ConfigurationError torch is not installed, which all-mpnet-base-v2 needs: pip")
