"""Failing micro-batches: each guilty job fails by its text, and every other gets what it gets alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedq.model import DeviceLostError, Encoder, NoopEncoder, OutOfMemoryError, TokenizedText
from embedq.producer import EmbedOptions, EmbedQueue, JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker.budget import PATIENCE
from embedq.worker.engine import Engine, Work
from tests.conftest import Drain

#: What a text does to the encoder, by its words; those before it are good.
GOOD, HUNGRY, NAN, BROKEN = "good", "hungry " * 4, "nan " * 5, "broken " * 6
CODES = {HUNGRY: "out_of_memory", NAN: "non_finite", BROKEN: "encode_failed"}
#: What a user wrote and nobody but the user shall read.
SECRET = "my diagnosis"


class Faulty(NoopEncoder):
    """Has no memory for more than `capacity` tokens at once, nor for texts of four words; makes NaN of texts of five,
    and raises for those of six.
    """

    placement = "gpu float16"

    def __init__(self, capacity: int = 10**9, exact: Encoder | None = None) -> None:
        super().__init__(8)
        self.capacity = capacity
        self.exact = exact
        self.batches: list[list[int]] = []
        self.num_releases = 0

    def _refuse(self, batch: Sequence[TokenizedText]) -> None:
        lengths = [text.num_tokens for text in batch]
        self.batches.append(lengths)
        if sum(lengths) > self.capacity or 6 in lengths:
            raise OutOfMemoryError("gpu is out of memory")
        if 8 in lengths:
            raise RuntimeError(f"cannot do {SECRET}\n" + "x" * 10_000)

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        self._refuse(batch)
        rows = super().encode_tokens(batch).copy()
        rows[[text.num_tokens == 7 for text in batch]] = np.nan
        return rows

    def encode_states(self, batch: Sequence[TokenizedText]) -> list[NDArray[np.float32]]:
        self._refuse(batch)
        states = super().encode_states(batch)
        return [np.where(len(part) == 7, np.inf, part).astype(np.float32) for part in states]

    def release_memory(self) -> None:
        self.num_releases += 1

    def in_float32(self) -> Encoder | None:  # type: ignore[override]
        return self.exact


def works_of(engine: Engine, jobs: Sequence[Sequence[str]], **options: Any) -> list[Work]:
    return [engine.tokenize(EmbedRequest(list(texts), EmbedOptions(**options))) for texts in jobs]


def encode_together(engine: Engine, works: Sequence[Work]) -> list[Work]:
    return engine.encode([(work, place) for work in works for place in range(len(work.tokens))])


texts = st.one_of(st.sampled_from([HUNGRY, NAN, BROKEN]), st.text("abc", min_size=1, max_size=5), st.just("two words"))


@settings(deadline=None)
@given(
    st.lists(st.lists(texts, min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 60),
    st.sampled_from(["sentence", "tokens"]),
)
def test_exactly_the_guilty_fail_and_all_others_get_what_they_get_alone(
    jobs: list[list[str]], capacity: int, output: Any
) -> None:
    encoder = Faulty(capacity=max(capacity, 8))
    engine = Engine(encoder, max_batch_tokens=100)
    works = works_of(engine, jobs, output=output)
    done = encode_together(engine, works)
    assert done == works
    alone = Engine(NoopEncoder(8))
    for work, of_job in zip(works, jobs, strict=True):
        if not CODES.keys() & set(of_job):
            wanted = alone.run(EmbedRequest(of_job, EmbedOptions(output=output)))
            np.testing.assert_array_equal(engine.finish(work).vectors, wanted.vectors)  # to the bit
            continue
        assert work.failure is not None
        assert work.failure.text_index is not None
        assert work.failure.code == CODES[of_job[work.failure.text_index]]
        assert work.failure.retryable is (work.failure.code != "non_finite")
        assert work.failure.message.startswith(f"text {work.failure.text_index}")
    num_texts = sum(map(len, jobs))
    assert len(encoder.batches) <= 3 * num_texts
    assert 1 <= engine.isolation.memory.limit <= 100


def test_memory_that_runs_out_halves_the_budget_until_it_suffices_again(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Faulty(capacity=30)
    engine = Engine(encoder, max_batch_tokens=120)
    jobs = [[f"word{n}"] for n in range(40)]  # 120 tokens
    with caplog.at_level(logging.INFO, logger="embedq.worker"):
        works = works_of(engine, jobs)
        encode_together(engine, works)
        assert [sum(lengths) for lengths in encoder.batches] == [120, 60, 30, 30, 30, 30]
        assert engine.isolation.oom_splits == 2
        assert encoder.num_releases == 2
        assert engine.isolation.memory.limit == 30
        encoder.batches.clear()
        encode_together(engine, works_of(engine, jobs))
        assert [sum(lengths) for lengths in encoder.batches] == [30] * 4
        encoder.capacity = 1000
        for _ in range(PATIENCE):
            encode_together(engine, works_of(engine, jobs))
        encoder.batches.clear()
        encode_together(engine, works_of(engine, jobs))
        assert [sum(lengths) for lengths in encoder.batches] == [120]
    ours = [record.message for record in caplog.records if "micro-batches have" in record.message]
    assert ours == [
        "out of memory: micro-batches have at most 30 tokens for a while, not 120",
        "memory suffices again: micro-batches have up to 120 tokens",
    ]
    assert all(work.failure is None for work in works)


def test_a_text_too_large_by_itself_is_tried_once_more_and_lowers_nothing() -> None:
    encoder = Faulty()
    engine = Engine(encoder, max_batch_tokens=1000)
    works = works_of(engine, [["a"], ["b", HUNGRY], ["c"], ["d"]])
    encode_together(engine, works)
    assert encoder.batches.count([6]) == 2
    assert encoder.batches[-1] != [6], "the others follow"
    assert [work.failure is not None for work in works] == [False, True, False, False]
    with pytest.raises(JobFailedError, match="text 1: the worker has not enough memory even for this") as caught:
        engine.finish(works[1])
    assert (caught.value.code, caught.value.retryable, caught.value.text_index) == ("out_of_memory", True, 1)
    assert engine.isolation.memory.is_whole


def test_a_text_that_needs_all_the_memory_there_is_gets_it() -> None:
    class Fragmented(Faulty):
        def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
            if not self.num_releases:
                raise MemoryError
            return super().encode_tokens(batch)

    engine = Engine(Fragmented())
    assert engine.run(EmbedRequest(["a"], EmbedOptions())).vectors.shape == (1, 8)


@pytest.mark.parametrize("output", ["sentence", "tokens"])
def test_a_vector_that_is_not_finite_is_made_in_float32(caplog: pytest.LogCaptureFixture, output: Any) -> None:
    exact = NoopEncoder(8)
    engine = Engine(Faulty(exact=exact))
    jobs = [["a", NAN], [NAN + " "], ["c"]]
    works = works_of(engine, jobs, output=output)
    with caplog.at_level(logging.INFO, logger="embedq.worker"):
        encode_together(engine, works)
    for work, of_job in zip(works, jobs, strict=True):
        wanted = Engine(exact).run(EmbedRequest(of_job, EmbedOptions(output=output)))
        np.testing.assert_array_equal(engine.finish(work).vectors, wanted.vectors)
    assert engine.isolation.num_in_float32 == 2
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message.startswith("a vector was not finite by gpu float16 and was made in float32")


@pytest.mark.parametrize("reason", ["it is not finite either", "memory runs out", "it breaks"])
def test_where_float32_does_not_help_the_job_fails_by_its_number(reason: str) -> None:
    class Useless(Faulty):
        def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
            if reason == "memory runs out":
                raise MemoryError
            if reason == "it breaks":
                raise RuntimeError
            return super().encode_tokens(batch)

    exact = Useless()
    engine = Engine(Faulty(exact=exact))
    works = works_of(engine, [["a", NAN], ["c"]])
    encode_together(engine, works)
    with pytest.raises(JobFailedError, match="text 1: the model's output is not finite") as caught:
        engine.finish(works[0])
    assert (caught.value.code, caught.value.retryable, caught.value.text_index) == ("non_finite", False, 1)
    assert engine.finish(works[1]).vectors.shape == (1, 8)
    assert engine.isolation.num_in_float32 == 0
    assert exact.num_releases == 1


class Lost(Faulty):
    """The device breaks at the given call."""

    def __init__(self, call: int, exact: Encoder | None = None) -> None:
        super().__init__(exact=exact)
        self.call = call

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        if len(self.batches) + 1 == self.call:
            self.batches.append([])
            raise DeviceLostError("cuda:0 is lost to this process (unspecified launch failure): start a new one")
        return super().encode_tokens(batch)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_lost_device_ends_the_micro_batch_at_once_and_fails_no_job(call: int) -> None:
    encoder = Lost(call)
    engine = Engine(encoder)
    works = works_of(engine, [["a"], ["b", BROKEN], ["c"], ["d"]])
    with pytest.raises(DeviceLostError):
        encode_together(engine, works)
    assert len(encoder.batches) == call
    assert all(work.failure is None for work in works)


def test_each_call_of_the_encoder_is_watched_by_itself_with_the_texts_it_has() -> None:
    watched: list[int] = []

    @contextlib.contextmanager
    def watching(pieces: Sequence[Any]) -> Iterator[None]:
        watched.append(len(pieces))
        yield

    engine = Engine(Faulty(capacity=12), watching=watching)
    works = [engine.tokenize(EmbedRequest([GOOD], EmbedOptions())) for _ in range(8)]
    assert len(engine.encode([(work, 0) for work in works])) == 8
    # Eight texts of three tokens: halved once, and from then on as many as fit.
    assert watched == [8, 4, 4]
    assert len(engine.isolation.at_work) == 4


def test_a_device_that_is_lost_in_float32_is_lost() -> None:
    engine = Engine(Faulty(exact=Lost(1)))
    with pytest.raises(DeviceLostError):
        encode_together(engine, works_of(engine, [[NAN]]))


def test_one_request_end_to_end_fails_retryably_where_the_device_is_lost() -> None:
    with pytest.raises(JobFailedError, match="unspecified launch failure") as caught:
        Engine(Lost(1)).run(EmbedRequest(["a"], EmbedOptions()))
    assert (caught.value.code, caught.value.retryable) == ("device_lost", True)


def test_a_job_that_failed_by_one_text_has_no_other_one_tried() -> None:
    encoder = Faulty()
    engine = Engine(encoder)
    work, other = works_of(engine, [[BROKEN] * 64, ["a"]])
    encode_together(engine, [work, other])
    assert encoder.batches.count([8]) == 1
    assert other.failure is None


class Indiscreet(Faulty):
    """Quotes the user in what it raises at `step`."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def tokenize(self, texts: Sequence[str], **options: Any) -> list[TokenizedText]:
        if self.step == "tokenize":
            raise KeyError(SECRET)
        return super().tokenize(texts, **options)

    def postprocess(self, vectors: NDArray[np.float32], **options: Any) -> NDArray[np.generic]:
        if self.step == "postprocess" and len(vectors):
            raise ZeroDivisionError(SECRET)
        return super().postprocess(vectors, **options)


@pytest.mark.parametrize("step", ["tokenize", "encode", "postprocess"])
def test_what_an_error_quotes_is_in_the_jobs_failure_and_not_in_the_log(
    caplog: pytest.LogCaptureFixture, step: str
) -> None:
    engine = Engine(Indiscreet(step))
    text = BROKEN if step == "encode" else SECRET
    with caplog.at_level(logging.INFO), pytest.raises(JobFailedError) as caught:
        engine.run(EmbedRequest(["a", text], EmbedOptions()))
    kind = {"tokenize": "KeyError", "encode": "RuntimeError", "postprocess": "ZeroDivisionError"}[step]
    formatted = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert kind in formatted
    assert SECRET not in formatted
    assert kind in caught.value.message
    assert SECRET in caught.value.message
    assert len(caught.value.message) < 300
    assert "\n" not in str(caught.value)
    caplog.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(JobFailedError):
        engine.run(EmbedRequest(["a", text], EmbedOptions()))
    assert "Traceback" in caplog.text


def test_memory_that_runs_out_elsewhere_fails_its_job_by_that_name() -> None:
    class Hungry(NoopEncoder):
        def tokenize(self, *_: Any, **__: Any) -> list[TokenizedText]:
            raise MemoryError(SECRET)

    with pytest.raises(JobFailedError, match="not enough memory for this job") as caught:
        Engine(Hungry(8)).tokenize(EmbedRequest(["a"], EmbedOptions()))
    assert (caught.value.code, caught.value.retryable) == ("out_of_memory", True)


def test_what_becomes_infinite_only_in_the_result_never_leaves() -> None:
    """A float16 ends at 65504, and so does a mean of windows at float32's end."""

    class Large(NoopEncoder):
        def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
            size = np.array([3e38 if text.num_tokens > 5 else text.num_tokens * 20_000 for text in batch])
            return np.repeat(size[:, None], 8, axis=1).astype(np.float32)

    engine = Engine(Large(8))
    good, halves = works_of(engine, [["a"], ["a", "b c"]], precision="float16", normalize=False)
    [windows] = works_of(engine, [["a", "word " * 1000]], chunk=True)
    for work in (good, halves, windows):
        encode_together(engine, [work])
    finished = engine.finish_all([good, halves, windows])
    assert not isinstance(finished[0], JobFailedError)
    for failure in finished[1:]:
        assert isinstance(failure, JobFailedError)
        assert (failure.code, failure.text_index, failure.retryable) == ("non_finite", 1, False)


def test_a_worker_gets_through_a_queue_of_all_kinds_and_names_each_guilty_text(
    queue: EmbedQueue, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Faulty(capacity=200)
    monkeypatch.setattr("embedq.worker.worker.load_encoder", lambda _settings: encoder)
    good = queue.enqueue_many([f"{GOOD} {n}" for n in range(500)])
    bad = {kind: queue.enqueue(["a", "b", kind], retries=0) for kind in CODES}
    worker = drain()
    for kind, job in bad.items():
        with pytest.raises(JobFailedError, match="text 2") as caught:
            job.result(timeout=0)
        assert (caught.value.code, caught.value.text_index) == (CODES[kind], 2)
    alone = Engine(NoopEncoder(8))
    for n, job in enumerate(good):
        wanted = alone.run(EmbedRequest([f"{GOOD} {n}"], EmbedOptions())).vectors
        np.testing.assert_array_equal(job.result(timeout=0).vectors, wanted)
    assert worker.engine.isolation.oom_splits > 0
