"""The whole way on the real weights: what comes out of the queue is what the encoder itself gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedq.model import SentenceEncoder
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
    drain(model=str(real_model_path), max_batch_tokens=512)
    wanted = SentenceEncoder.load(str(real_model_path)).encode(TEXTS)

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
