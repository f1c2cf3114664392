"""The whole way on the real weights: what comes out of the queue is what the encoder itself gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedq.model import Calibration, SentenceEncoder, dequantize
from embedq.producer import EmbedQueue, JobFailedError
from tests.conftest import Drain

TEXTS = [
    *("Where do otters sleep?", "", "   ", "ÄÖÜ ß – 日本語のテキスト", "👩‍👩‍👧 emoji 🦦"),
    *("word " * 600, "a", "Two sentences. Each of them short."),
]


@pytest.mark.real_model
def test_vectors_from_the_queue_equal_the_encoders_own(queue: EmbedQueue, drain: Drain, real_model_path: Path) -> None:
    singles = queue.enqueue_many(TEXTS)
    together = queue.enqueue(TEXTS)
    cut = queue.enqueue(TEXTS, dimensions=64, precision="float16")
    too_long = queue.enqueue(TEXTS, truncate=False)
    drain(model=str(real_model_path), dtype="float32", max_batch_tokens=512)
    wanted = SentenceEncoder.load(str(real_model_path), dtype="float32").encode(TEXTS)

    result = together.result(timeout=0)
    np.testing.assert_allclose(result.vectors, wanted, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([job.result(timeout=0).vectors for job in singles]), wanted, atol=2e-6)
    assert result.model == "sentence-transformers/all-mpnet-base-v2"
    assert result.num_tokens[5] == 384
    assert result.truncated == tuple(place == 5 for place in range(len(TEXTS)))
    short = wanted[:, :64] / np.linalg.norm(wanted[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(cut.result(timeout=0).vectors.astype(np.float32), short, atol=1e-3)
    with pytest.raises(JobFailedError) as caught:
        too_long.result(timeout=0)
    assert (caught.value.code, caught.value.text_index) == ("text_too_long", 5)


@pytest.mark.real_model
def test_bytes_tokens_and_windows_from_the_queue_equal_the_encoders_own(
    queue: EmbedQueue, drain: Drain, real_model_path: Path, tmp_path: Path
) -> None:
    encoder = SentenceEncoder.load(str(real_model_path), device="cpu", dtype="float32")
    texts = ["Where do otters sleep?", "Afloat. " * 150]
    vectors = encoder.encode(texts)
    mine = Calibration({768: np.stack((vectors.min(axis=0), vectors.max(axis=0)))}, normalized=True)
    file = tmp_path / "ranges.safetensors"
    file.write_bytes(mine.to_bytes({}))
    as_bytes, cut = queue.enqueue(texts, precision="uint8"), queue.enqueue(texts, precision="uint8", dimensions=256)
    tokens = queue.enqueue(texts, output="tokens", precision="float16")
    chunked = queue.enqueue(texts, chunk=True, chunk_overlap=100)
    drain(model=str(real_model_path), dtype="float32", calibration=str(file))

    result = as_bytes.result(timeout=0)
    assert (result.vectors.dtype, result.calibration) == (np.uint8, mine.digest)
    steps = (mine.ranges[768][1] - mine.ranges[768][0]) / 255
    assert (np.abs(dequantize(result.vectors, mine.ranges[768]) - vectors) <= steps / 2 + 1e-6).all()
    with pytest.raises(JobFailedError, match="no ranges for 256 dimensions, only for 768"):
        cut.result(timeout=0)
    states = encoder.encode(texts, output="tokens")
    for part, wanted in zip(tokens.result(timeout=0).tokens, states, strict=True):
        np.testing.assert_allclose(part, wanted, atol=2e-3)
    wanted = encoder.encode(texts, chunk=True, chunk_overlap=100)
    np.testing.assert_allclose(chunked.result(timeout=0).vectors, wanted, atol=2e-6)
    assert chunked.result(timeout=0).num_tokens == tuple(text.num_tokens for text in encoder.tokenize_windows(texts))
