"""What the model's tests share: one tiny random model a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_folder, write_modules, write_pooling


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mean pooling and Normalize, three heads. Not to be changed: copy it or take `own_folder`."""
    return _write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """The same for one test to break."""
    return _write(tmp_path)


def _write(folder: Path) -> Path:
    write_folder(folder)
    write_modules(folder, "Pooling", "Normalize")
    write_pooling(folder, pooling_mode_mean_tokens=True)
    return folder
