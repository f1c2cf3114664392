"""The code of an earlier release beside this one: its packages in a folder, as they stood at a commit."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from tests.ops.places import ROOT

PACKAGES = ("producer", "worker", "model")


def unpack(commit: str, folder: Path) -> Path:
    """A folder that may stand on Python's path; `embedq` in it is that commit's. Raises CalledProcessError."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit, *PACKAGES], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(folder / "embedq", filter="data")
    return folder
