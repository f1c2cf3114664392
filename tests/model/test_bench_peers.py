"""What `make bench` measures the encoder with: the peers' processes and the limit by matrix products."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from embedq.model import SentenceEncoder
from embedq.model.config import read_config
from tests.bench.gemm_limit import GemmLimit, micro_batches
from tests.bench.peer_environment import CONSTRAINTS, REQUIREMENTS
from tests.bench.peers import Peer, PeerError

TEXTS = ["the dog", "the quick brown fox jumps over the dog", "a", "running dogs!"]
#: Largest difference of a normalised vector's component.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")


def _peer(system: str, model: Path, log: Path) -> Peer:
    return Peer(system, python=Path(sys.executable), model=model, models=log.parent, log=log, threads=1)


def test_a_peer_answers_with_vectors_and_seconds(encoder: SentenceEncoder, tiny_folder: Path, tmp_path: Path) -> None:
    with _peer("torch", tiny_folder, tmp_path / "log") as peer:
        np.testing.assert_allclose(peer.encode(TEXTS, 2), encoder.encode(TEXTS), atol=TOLERANCE, rtol=0)
        assert 0 < peer.seconds(TEXTS, 8) < 60
        assert "sentence-transformers" in peer.versions


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"(?s)status 1.*no-such-system"):
        _peer("no-such-system", tmp_path, tmp_path / "log")


def test_micro_batches_are_those_of_the_encoder(encoder: SentenceEncoder) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    ours = [int(lengths[rows].sum()) for rows in encoder._embedder._cut(np.argsort(-lengths, kind="stable"), lengths)]
    assert micro_batches(lengths.tolist(), encoder.max_batch_tokens) == ours
    assert micro_batches([50, 3], max_batch_tokens=10) == [50, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_limit_runs_every_product(dtype: str, tiny_folder: Path) -> None:
    limit = GemmLimit(read_config(tiny_folder), dtype)
    assert 0 < limit.seconds([40, 17]) < 60


def test_every_requirement_is_pinned() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    for requirement in REQUIREMENTS:
        name, _, number = requirement.partition("==")
        assert pinned[name.partition("[")[0]] == (number or pinned[name.partition("[")[0]])
