"""The engine without Redis: one text's failure is its job's alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedq.model import NoopEncoder, TokenizedText
from embedq.producer import EmbedOptions, JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker import tasks
from embedq.worker.engine import Engine


class MoodyEncoder(NoopEncoder):
    """Chokes on texts of three words, and makes NaN of texts of four."""

    def __init__(self) -> None:
        super().__init__(8)
        self.batches: list[int] = []

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        self.batches.append(len(batch))
        if any(text.num_tokens == 5 for text in batch):
            raise RuntimeError("cannot do three words")
        rows = super().encode_tokens(batch).copy()
        rows[[text.num_tokens == 6 for text in batch]] = np.nan
        return rows


def request(*texts: str, **options: Any) -> EmbedRequest:
    return EmbedRequest(list(texts), EmbedOptions(**options))


def test_a_batch_that_raises_is_halved_until_the_guilty_text_is_alone() -> None:
    engine = Engine(MoodyEncoder())
    works = [engine.tokenize(request(f"word {n}")) for n in range(7)]
    works.insert(3, engine.tokenize(request("fine", "three words here")))
    [batch] = engine.plan(works)
    engine.encode(batch)
    for place, work in enumerate(works):
        if place != 3:
            assert engine.finish(work).vectors.shape == (1, 8)
    with pytest.raises(JobFailedError, match="text 1 could not be encoded: RuntimeError: cannot do") as caught:
        engine.finish(works[3])
    assert (caught.value.code, caught.value.text_index, caught.value.retryable) == ("encode_failed", 1, True)


def test_a_vector_that_is_not_finite_never_leaves() -> None:
    engine = Engine(MoodyEncoder())
    with pytest.raises(JobFailedError, match="text 1: the model's output is not finite") as caught:
        engine.run(request("fine", "four words make nan"))
    assert (caught.value.code, caught.value.text_index) == ("non_finite", 1)


def test_a_failed_job_is_encoded_no_further() -> None:
    encoder = MoodyEncoder()
    engine = Engine(encoder, max_batch_tokens=5)
    work = engine.tokenize(request("a b c", "d e f", "g h i"))
    for batch in engine.plan([work]):
        engine.encode(batch)
    assert encoder.batches == [1]


def test_a_job_may_be_spread_over_micro_batches() -> None:
    engine = Engine(NoopEncoder(8), max_batch_tokens=9)
    texts = [f"text {n}" for n in range(10)]
    result = engine.run(request(*texts))
    for row, text in zip(result.vectors, texts, strict=True):
        np.testing.assert_array_equal(row, engine.run(request(text)).vectors[0])
    assert result.timings.batch_tokens == 8
    assert result.timings.batch_texts == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"model": "other"}, "wrong_model", "wants model other, this worker serves noop:8"),
        ({"prompt_name": "query"}, "unsupported_option", "query"),
        ({"dimensions": 9}, "unsupported_option", "dimensions must be 1 to 8"),
        ({"chunk": True, "chunk_overlap": 382}, "unsupported_option", "chunk_overlap must be 0 to 381"),
        ({"chunk": True, "prompt": "word " * 382}, "unsupported_option", "the prompt leaves no room"),
        ({"output": "tokens", "dimensions": 9}, "unsupported_option", "dimensions must be 1 to 8"),
        ({"truncate": False}, "text_too_long", "384"),
    ],
)
def test_what_the_model_cannot_do_fails_before_anything_is_encoded(
    options: dict[str, Any], code: str, message: str
) -> None:
    encoder = MoodyEncoder()
    with pytest.raises(JobFailedError, match=message) as caught:
        Engine(encoder).tokenize(request("short", "word " * 500, **options))
    assert caught.value.code == code
    assert caught.value.text_index == (1 if code == "text_too_long" else None)
    assert not caught.value.retryable
    assert encoder.batches == []


def test_options_reach_the_vectors() -> None:
    engine = Engine(NoopEncoder(64))
    plain = engine.run(request("text", model="noop:64")).vectors
    assert np.linalg.norm(plain) == pytest.approx(1.0)
    cut = engine.run(request("text", dimensions=5)).vectors
    np.testing.assert_allclose(cut, plain[:, :5] / np.linalg.norm(plain[:, :5]), atol=1e-6)
    assert engine.run(request("text", precision="ubinary")).vectors.dtype == np.uint8
    assert not np.allclose(engine.run(request("text", prompt="query: ")).vectors, plain)
    long = engine.run(request("word " * 500))
    assert (long.num_tokens, long.truncated) == ((384,), (True,))


def test_the_task_that_a_stock_worker_runs_gives_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_MODEL", "noop:8")
    tasks._engine.cache_clear()
    result = tasks.embed(texts=["text"], dimensions=4, version=1)
    np.testing.assert_array_equal(result.vectors, Engine(NoopEncoder(8)).run(request("text", dimensions=4)).vectors)
    with pytest.raises(JobFailedError, match="unknown option") as caught:
        tasks.embed(texts=["text"], evil=1)
    assert caught.value.code == "bad_payload"
    tasks._engine.cache_clear()
