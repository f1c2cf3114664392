"""The engine without Redis: one text's failure is its job's alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedq.model import NonFiniteError, NoopEncoder, TokenizedText
from embedq.producer import EmbedOptions, JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker import tasks
from embedq.worker.engine import Engine, Piece, Work
from embedq.worker.planning import ReadyTexts


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


def planned(engine: Engine, works: Sequence[Work]) -> list[list[Piece]]:
    """The micro-batches of these jobs, in the order in which they are encoded."""
    ready = ReadyTexts(engine.max_batch_tokens)
    ready.add([work.ready() for work in works])
    batches = []
    while ready:
        batches.append(ready.take())
    return batches


def test_a_batch_that_raises_is_halved_until_the_guilty_text_is_alone() -> None:
    engine = Engine(MoodyEncoder())
    works = [engine.tokenize(request(f"word {n}")) for n in range(7)]
    works.insert(3, engine.tokenize(request("fine", "three words here")))
    [batch] = planned(engine, works)
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


def test_an_encoder_that_refuses_to_give_nan_fails_the_guilty_job_alone() -> None:
    class StrictEncoder(MoodyEncoder):
        def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
            rows = super().encode_tokens(batch)
            for index, row in enumerate(rows):
                if np.isnan(row).any():
                    raise NonFiniteError("NaN or Inf first in layer 2 of 12", index)
            return rows

    engine = Engine(StrictEncoder())
    works = [engine.tokenize(request(f"word {n}")) for n in range(5)]
    works.insert(2, engine.tokenize(request("fine", "also fine", "four words make nan")))
    [batch] = planned(engine, works)
    engine.encode(batch)
    for place, work in enumerate(works):
        if place != 2:
            assert engine.finish(work).vectors.shape == (1, 8)
    with pytest.raises(JobFailedError, match=r"^text 2: NaN or Inf first in layer 2 of 12") as caught:
        engine.finish(works[2])
    assert (caught.value.code, caught.value.text_index, caught.value.retryable) == ("non_finite", 2, False)


def test_a_budget_that_the_encoder_lowered_counts() -> None:
    encoder = NoopEncoder(8)
    encoder.max_batch_tokens = 40
    assert Engine(encoder, max_batch_tokens=100).max_batch_tokens == 40
    assert Engine(encoder, max_batch_tokens=30).max_batch_tokens == 30
    assert Engine(encoder).max_batch_tokens == 40


def test_a_failed_job_is_encoded_no_further() -> None:
    encoder = MoodyEncoder()
    engine = Engine(encoder, max_batch_tokens=5)
    work = engine.tokenize(request("a b c", "d e f", "g h i"))
    done = [engine.encode(batch) for batch in planned(engine, [work])]
    assert encoder.batches == [1]
    assert done == [[work], [], []]  # told once


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


def test_token_output_is_filled_piece_by_piece_and_shares_no_batch_with_sentences() -> None:
    encoder = NoopEncoder(8)
    engine = Engine(encoder, max_batch_tokens=8)
    texts = ["a b c", "d", "", "e f g h i j k l m"]
    works = [engine.tokenize(request(*texts, output=output)) for output in ("tokens", "sentence", "tokens")]
    batches = planned(engine, works)
    assert sorted((work is works[1], place) for batch in batches for work, place in batch) == sorted(
        (place == 1, index) for place in range(3) for index in range(4)
    )
    for batch in batches:
        assert len({work.output for work, _ in batch}) == 1
        engine.encode(batch)
    result = engine.finish(works[0])
    assert result.output == "tokens"
    assert result.num_tokens == (5, 3, 2, 11)
    for part, wanted in zip(result.tokens, encoder.encode_states(encoder.tokenize(texts)), strict=True):
        np.testing.assert_array_equal(part, wanted)
    np.testing.assert_array_equal(engine.finish(works[1]).vectors, engine.run(request(*texts)).vectors)


def test_the_most_urgent_text_is_encoded_first_whatever_its_output() -> None:
    engine = Engine(NoopEncoder(8), max_batch_tokens=3)
    works = [engine.tokenize(request("a", output=output)) for output in ("tokens", "sentence", "tokens", "sentence")]
    assert [works.index(batch[0][0]) for batch in planned(engine, works)] == [0, 1, 2, 3]


def test_token_output_takes_half_floats_and_dimensions() -> None:
    result = Engine(NoopEncoder(8)).run(request("a b", output="tokens", precision="float16", dimensions=3))
    assert (result.vectors.shape, result.vectors.dtype) == ((4, 3), np.float16)
    unit = Engine(NoopEncoder(8)).run(request("a b", output="tokens", normalize=True, dimensions=3))
    np.testing.assert_allclose(np.linalg.norm(unit.vectors, axis=1), 1, atol=1e-6)


def test_too_much_token_output_is_refused_before_anything_is_encoded() -> None:
    encoder = MoodyEncoder()
    text = "word " * 500  # 384 tokens x 8 x 4 bytes
    engine = Engine(encoder)
    assert engine.tokenize(request(*[text] * 1024, output="tokens")).missing == 1024
    wide = Engine(NoopEncoder(768))
    with pytest.raises(JobFailedError, match=r"22,272 tokens x 768 float32 are 68,419,584 bytes of output") as caught:
        wide.tokenize(request(*[text] * 58, output="tokens"))
    assert (caught.value.code, caught.value.retryable) == ("output_too_large", False)
    assert wide.tokenize(request(*[text] * 58, output="tokens", precision="float16")).missing == 58
    assert encoder.batches == []


def test_a_token_vector_that_is_not_finite_fails_its_job_alone() -> None:
    class Broken(NoopEncoder):
        def encode_states(self, batch: Sequence[TokenizedText]) -> list[NDArray[np.float32]]:
            states = super().encode_states(batch)
            return [np.where(len(part) == 4, np.inf, part).astype(np.float32) for part in states]

    engine = Engine(Broken(8))
    works = [
        engine.tokenize(request("a", "two words", output="tokens")),
        engine.tokenize(request("b", output="tokens")),
    ]
    [batch] = planned(engine, works)
    engine.encode(batch)
    assert engine.finish(works[1]).vectors.shape == (3, 8)
    with pytest.raises(JobFailedError, match="text 1: the model's output is not finite"):
        engine.finish(works[0])


def test_windows_are_pieces_of_their_own_and_the_vector_is_their_mean() -> None:
    encoder = NoopEncoder(64)
    engine = Engine(encoder, max_batch_tokens=400)
    texts = ["short", " ".join(f"w{index}" for index in range(2000)), "other"]
    work = engine.tokenize(request(*texts, chunk=True, chunk_overlap=20, dimensions=32))
    batches = planned(engine, [work])
    assert len(batches) == 6  # one for each window; the short texts share the first
    for batch in reversed(batches):
        engine.encode(batch)
    result = engine.finish(work)
    windows = [text.windows for text in encoder.tokenize_windows(texts, overlap=20)]
    wanted = np.stack([encoder.encode_tokens(text).mean(axis=0)[:32] for text in windows])
    np.testing.assert_allclose(result.vectors, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    assert result.num_tokens == (3, 2002, 3)
    assert result.truncated == (False, False, False)


def test_a_window_that_cannot_be_encoded_names_its_text() -> None:
    class NoWindows(NoopEncoder):
        def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
            if any(text.num_tokens == 384 for text in batch):
                raise MemoryError
            return super().encode_tokens(batch)

    with pytest.raises(JobFailedError, match="text 1: the worker has not enough memory") as caught:
        Engine(NoWindows(8)).run(request("short", "word " * 1000, chunk=True))
    assert (caught.value.code, caught.value.text_index, caught.value.retryable) == ("out_of_memory", 1, True)


def test_a_text_of_too_many_windows_fails_its_job_by_index() -> None:
    with pytest.raises(JobFailedError, match="that 1,024 windows hold: split it") as caught:
        Engine(NoopEncoder(8)).tokenize(request("fine", "w " * 400_000, chunk=True))
    assert (caught.value.code, caught.value.text_index) == ("text_too_long", 1)


@pytest.mark.parametrize(
    ("precision", "digest"), [("int8", "unit"), ("uint8", "unit"), ("binary", ""), ("float32", "")]
)
def test_a_result_names_the_ranges_it_was_made_with(precision: Any, digest: str) -> None:
    assert Engine(NoopEncoder(8)).run(request("a", precision=precision)).calibration == digest


def test_the_task_that_a_stock_worker_runs_gives_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_MODEL", "noop:8")
    tasks._engine.cache_clear()
    result = tasks.embed(texts=["text"], dimensions=4, version=1)
    np.testing.assert_array_equal(result.vectors, Engine(NoopEncoder(8)).run(request("text", dimensions=4)).vectors)
    with pytest.raises(JobFailedError, match="unknown option") as caught:
        tasks.embed(texts=["text"], evil=1)
    assert caught.value.code == "bad_payload"
    tasks._engine.cache_clear()


def test_a_batch_that_fails_half_way_counts_no_text_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out for the second job's rows, after those of the first."""
    engine = Engine(NoopEncoder(8))
    works = [engine.tokenize(request("a", "b", "c")), engine.tokenize(request("d", "e", "f"))]
    reserve, calls = Work.reserve, []

    def fail_once(self: Work, num_rows: int, like: NDArray[Any]) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        reserve(self, num_rows, like)

    monkeypatch.setattr(Work, "reserve", fail_once)
    assert engine.encode([(works[0], 0), (works[0], 1), (works[1], 0)]) == []
    assert [work.missing for work in works] == [1, 2]
    assert engine.encode([(works[0], 2), (works[1], 1), (works[1], 2)]) == works
    for work in works:
        np.testing.assert_array_equal(engine.finish(work).vectors, engine.run(work.request).vectors)


def test_a_failed_batch_is_out_of_memory_before_its_halves_are_encoded() -> None:
    alive: list[int] = []

    class Blob:
        count = 0

        def __init__(self) -> None:
            Blob.count += 1

        def __del__(self) -> None:
            Blob.count -= 1

    class Hungry(NoopEncoder):
        def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
            alive.append(Blob.count)
            activations = Blob()
            if len(batch) > 1:
                raise MemoryError
            del activations
            return super().encode_tokens(batch)

    engine = Engine(Hungry(8))
    work = engine.tokenize(request("a", "b", "c", "d"))
    engine.encode(planned(engine, [work])[0])
    assert work.failure is None
    assert set(alive) == {0}
