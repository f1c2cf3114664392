"""Our end of the peers' processes: one for each, fed one request at a time."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCRIPT = Path(__file__).with_name("peer_process.py")
#: Everything is there already: a peer that asks a hub is to fail, not to wait.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
#: Characters of a failed peer's log that are shown.
LOG_TAIL = 2000


class PeerError(RuntimeError):
    """A peer's process ended; the message has the end of its log."""


class Peer:
    """Computes only while a call waits for it. Attributes: versions, load_s."""

    def __init__(self, system: str, *, python: Path, model: Path, models: Path, log: Path, threads: int) -> None:
        """`system` is a name of peer_process.SYSTEMS. Returns once the model is loaded."""
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(SCRIPT), system, str(model), str(models), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **OFFLINE},
                text=True,
            )
        loaded = self._answer()
        self.load_s: float = loaded["load_s"]
        self.versions: dict[str, str] = loaded["versions"]

    def seconds(self, texts: Sequence[str], batch_size: int) -> float:
        """Of encoding, tokenisation included; without what it takes to bring the texts here."""
        return float(self._ask(texts=list(texts), batch_size=batch_size)["seconds"])

    def encode(self, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vectors.npy"
            self._ask(texts=list(texts), batch_size=batch_size, save=str(path))
            return np.asarray(np.load(path), dtype=np.float32)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return dict(json.loads(line))

    def _ended(self) -> PeerError:
        self.close()
        log = self._log.read_text()[-LOG_TAIL:]
        return PeerError(f"a peer ended with status {self._process.returncode}; its log ends with\n{log}")

    def close(self) -> None:
        self._process.communicate()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._process.kill()
            self._process.communicate()
