"""The peers' virtual environment, made once, and the folder where their exported models are kept.

Everything comes from a package index; no model hub is asked.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = Path(__file__).with_name("peers_constraints.txt")
#: torch as a version: plain `torch` could bring another build than the one compared with.
REQUIREMENTS = ("torch==2.13.0", "sentence-transformers[onnx]", "optimum-intel[openvino]")
#: Hex digits of the constraints' SHA-256 in the folder's name: moved pins make a new environment and new exports.
DIGEST_DIGITS = 12


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    python: Path
    #: exported models, by the revision of the weights
    models: Path
    #: what the peers write to stderr
    logs: Path


def peer_environment(console: Console) -> PeerEnvironment:
    """Below build/, installed on first use. Raises CalledProcessError where pip fails."""
    digest = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()[:DIGEST_DIGITS]
    folder = ROOT / "build" / "bench-peers" / digest
    environment = PeerEnvironment(folder / "venv" / "bin" / "python", folder / "models", folder / "logs")
    installed = folder / ".installed"
    if not installed.exists():
        console.print(f"installing the peers into {folder.relative_to(ROOT)} (once) ...")
        venv.create(folder / "venv", clear=True, with_pip=True)
        pip = [str(environment.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--constraint", str(CONSTRAINTS), *REQUIREMENTS], check=True, stdout=sys.stderr)
        installed.touch()
    environment.models.mkdir(exist_ok=True)
    environment.logs.mkdir(exist_ok=True)
    return environment
