"""The peers' virtual environments, made once, and the folder where exported models are kept.

Everything comes from a package index; no model hub is asked.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = Path(__file__).with_name("peers_constraints.txt")
#: torch as a version: plain `torch` could bring another build than the one compared with.
REQUIREMENTS = ("torch==2.13.0", "sentence-transformers[onnx]", "optimum-intel[openvino]")
QUEUE_CONSTRAINTS = Path(__file__).with_name("queue_peers_constraints.txt")
#: hiredis is what makes redis-py fast, for those that use it.
QUEUE_REQUIREMENTS = ("huey", "dramatiq[redis]", "arq", "celery[redis]", "celery-batches", "hiredis", "numpy")
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
    return _environment(console, "bench-peers", CONSTRAINTS, REQUIREMENTS)


def queue_peer_environment(console: Console) -> PeerEnvironment:
    """The same for the queue's peers, which have no models."""
    return _environment(console, "bench-queue-peers", QUEUE_CONSTRAINTS, QUEUE_REQUIREMENTS)


def _environment(console: Console, name: str, constraints: Path, requirements: Sequence[str]) -> PeerEnvironment:
    digest = hashlib.sha256(constraints.read_bytes()).hexdigest()[:DIGEST_DIGITS]
    folder = ROOT / "build" / name / digest
    environment = PeerEnvironment(folder / "venv" / "bin" / "python", folder / "models", folder / "logs")
    installed = folder / ".installed"
    if not installed.exists():
        console.print(f"installing the peers into {folder.relative_to(ROOT)} (once) ...")
        venv.create(folder / "venv", clear=True, with_pip=True)
        pip = [str(environment.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--constraint", str(constraints), *requirements], check=True, stdout=sys.stderr)
        installed.touch()
    environment.models.mkdir(exist_ok=True)
    environment.logs.mkdir(exist_ok=True)
    return environment
