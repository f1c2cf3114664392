"""The stages' threads without Redis: bounds, back-pressure, lingering, and an orderly end whatever raises."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from embedq.model import NoopEncoder
from embedq.producer import EmbedOptions, JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker import pipeline as pipelines
from embedq.worker.claims import Claim, Outcome
from embedq.worker.engine import Engine, Piece, Work
from embedq.worker.pipeline import FEW_JOBS, MAX_LONG_JOBS, Bounds, Done, Pipeline
from embedq.worker.planning import ReadyJob
from tests.conftest import until


def claim(name: str, text: str = "one two three") -> Claim:
    """A text of five tokens."""
    return Claim("embed", name, "e", text.encode(), 0.0)


class Recorder:
    """Stages that remember what they were given, and wait where a test closes their gate."""

    def __init__(self) -> None:
        self.engine = Engine(NoopEncoder(8), 50)
        self.batches: list[list[str]] = []
        self.published: list[str] = []
        self.gates = {stage: threading.Event() for stage in ("tokenize", "encode", "publish")}
        for gate in self.gates.values():
            gate.set()

    def tokenize(self, claims: Sequence[Claim]) -> tuple[list[Work], list[Outcome], Sequence[Claim]]:
        self.gates["tokenize"].wait(20)
        works = []
        for found in claims:
            work = self.engine.tokenize(EmbedRequest(found.data.decode().split("/"), EmbedOptions()))
            work.tag = found
            works.append(work)
        return works, [], []

    def ready_job(self, work: Work) -> ReadyJob:
        return work.ready()

    def encode(self, batch: Sequence[Piece]) -> list[Work]:
        self.batches.append([work.tag.job_id for work, _ in batch])
        self.gates["encode"].wait(20)
        return self.engine.encode(batch)

    def publish(self, done: Sequence[Done]) -> None:
        self.gates["publish"].wait(20)
        self.published += [item.tag.job_id for item in done if isinstance(item, Work)]


@pytest.fixture
def stages() -> Recorder:
    return Recorder()


Start = Callable[..., Pipeline]


@pytest.fixture
def start(stages: Recorder) -> Iterator[Start]:
    started: list[Pipeline] = []

    def run(**bounds: Any) -> Pipeline:
        settings = {"max_batch_tokens": 50, "prefetch_tokens": 200, "prefetch_jobs": 1000, **bounds}
        pipeline = Pipeline(stages, Bounds(**settings), on_failure=lambda: None)
        pipeline.start()
        started.append(pipeline)
        return pipeline

    yield run
    for gate in stages.gates.values():
        gate.set()
    for pipeline in started:
        pipeline.stop()
        assert not any(thread.is_alive() for thread in pipeline._threads)


def test_what_is_put_in_comes_out_once(stages: Recorder, start: Start) -> None:
    pipeline = start()
    names = [f"job {n}" for n in range(100)]
    for first in range(0, 100, 10):
        assert pipeline.wait_for_room(20)
        pipeline.put([claim(name) for name in names[first : first + 10]], 50)
    assert pipeline.wait_until_empty(20)
    assert sorted(stages.published) == sorted(names)
    assert pipeline.num_jobs == 0
    assert all(len(batch) <= 10 for batch in stages.batches)


def test_a_partial_micro_batch_starts_at_once_on_a_free_device(stages: Recorder, start: Start) -> None:
    pipeline = start()
    pipeline.put([claim("alone")], 5)
    assert pipeline.wait_until_empty(20)
    assert stages.batches == [["alone"]]


def test_micro_batches_fill_up_while_the_device_is_busy(stages: Recorder, start: Start) -> None:
    pipeline = start()
    stages.gates["encode"].clear()
    pipeline.put([claim("first")], 5)
    until(lambda: stages.batches)
    for n in range(12):
        pipeline.put([claim(f"job {n}")], 5)
    until(lambda: pipeline._next is not None)
    stages.gates["encode"].set()
    assert pipeline.wait_until_empty(20)
    assert [len(batch) for batch in stages.batches] == [1, 10, 2]


def test_claims_wait_once_so_many_tokens_are_ahead(stages: Recorder, start: Start) -> None:
    pipeline = start()
    stages.gates["encode"].clear()
    pipeline.put([claim("first")], 5)
    until(lambda: stages.batches)
    put = 0
    while pipeline.wait_for_room(0.3):
        pipeline.put([claim(f"job {put}-{n}") for n in range(10)], 50)
        put += 1
        assert put < 50
    assert put == 4  # of 50 tokens each: as many as are ahead at most
    stages.gates["encode"].set()
    assert pipeline.wait_for_room(20)


def test_claims_wait_once_so_many_jobs_are_not_published(stages: Recorder, start: Start) -> None:
    pipeline = start(prefetch_jobs=7)
    stages.gates["publish"].clear()
    pipeline.put([claim(f"job {n}") for n in range(5)], 25)
    assert pipeline.wait_for_room(20)
    assert pipeline.room_jobs() == 2
    pipeline.put([claim("a"), claim("b")], 10)
    assert not pipeline.wait_for_room(0.2)
    stages.gates["publish"].set()
    assert pipeline.wait_for_room(20)


def test_the_device_waits_while_too_much_is_unpublished(
    stages: Recorder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "OUTBOX_BYTES", 8 * 4 * 3)  # three vectors
    pipeline = start(max_batch_tokens=5)
    stages.gates["publish"].clear()
    pipeline.put([claim(f"job {n}") for n in range(20)], 100)
    until(lambda: len(stages.batches) >= 3)
    time.sleep(0.3)
    assert len(stages.batches) <= 12  # three may wait, three be on their way twice, and some were let through before
    stages.gates["publish"].set()
    assert pipeline.wait_until_empty(20)


@pytest.mark.parametrize("number", [1, FEW_JOBS + 1])  # on the thread at hand, and on the stage's own
@pytest.mark.parametrize("stage", ["tokenize", "encode", "publish"])
def test_what_a_stage_raises_ends_the_others_and_reaches_the_claiming_thread(
    stages: Recorder, monkeypatch: pytest.MonkeyPatch, stage: str, number: int
) -> None:
    told = threading.Event()

    def broken(_: Any) -> Any:
        raise MemoryError(f"no more in {stage}")

    monkeypatch.setattr(stages, stage, broken)
    pipeline = Pipeline(stages, Bounds(max_batch_tokens=50, prefetch_tokens=200, prefetch_jobs=99), told.set)
    pipeline.start()

    def feed() -> None:
        pipeline.put([claim(f"job {n}") for n in range(number)], 5)
        assert told.wait(20)
        pipeline.wait_until_empty(20)

    with pytest.raises(MemoryError, match=f"no more in {stage}"):
        feed()
    pipeline.stop()
    pipeline.check()  # told once
    assert not any(thread.is_alive() for thread in pipeline._threads)


def test_stopping_finishes_and_publishes_what_is_on_the_device_and_leaves_the_rest(
    stages: Recorder, start: Start
) -> None:
    pipeline = start()
    stages.gates["encode"].clear()
    pipeline.put([claim("on the device")], 5)
    until(lambda: stages.batches)
    pipeline.put([claim(f"job {n}") for n in range(20)], 100)
    pipeline.ask_to_stop()
    stages.gates["encode"].set()
    pipeline.stop()
    assert stages.published == ["on the device"]
    assert pipeline.num_jobs == 20


def test_the_texts_of_a_failed_job_are_not_encoded_any_more(
    stages: Recorder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(batch: Sequence[Piece]) -> list[Work]:
        stages.batches.append([work.tag.job_id for work, _ in batch])
        batch[0][0].failure = JobFailedError("canceled", code="lost")
        return [batch[0][0]]

    monkeypatch.setattr(stages, "encode", encode)
    pipeline = start()
    pipeline.put([claim("many", "/".join(["one two three"] * 100))], 500)
    assert pipeline.wait_until_empty(20)
    assert len(stages.batches) == 1


def test_a_micro_batch_lingers_for_more_texts_but_a_full_one_does_not(stages: Recorder, start: Start) -> None:
    pipeline = start(linger_s=0.4)
    began_at = time.monotonic()
    pipeline.put([claim("first")], 5)
    time.sleep(0.1)
    pipeline.put([claim("second")], 5)
    assert pipeline.wait_until_empty(20)
    assert time.monotonic() - began_at >= 0.4
    assert stages.batches == [["first", "second"]]
    pipeline.put([claim(f"job {n}") for n in range(10)], 50)
    until(lambda: len(stages.batches) == 2)
    assert pipeline._bounds.linger_s == 0.4
    assert len(stages.batches[1]) == 10


def test_micro_batches_are_cut_smaller_where_that_keeps_the_latency(stages: Recorder, start: Start) -> None:
    pipeline = start(max_latency_s=0.5, prefetch_tokens=10_000)
    for tokens in (10, 20, 30, 40, 50) * 4:
        pipeline._encode_time.learn(tokens, tokens / 50)  # a full micro-batch takes a second
    stages.gates["encode"].clear()
    pipeline.put([claim("first")], 5)
    until(lambda: stages.batches)
    pipeline.put([claim(f"job {n}") for n in range(30)], 150)
    stages.gates["encode"].set()
    assert pipeline.wait_until_empty(20)
    assert len(stages.batches[1]) <= 5  # 25 tokens in half a second


def test_what_is_late_already_goes_in_full_micro_batches(stages: Recorder, start: Start) -> None:
    """Smaller ones would only make those behind it late, too."""
    pipeline = start(max_latency_s=0.01, prefetch_tokens=10_000)
    for tokens in (10, 20, 30, 40, 50) * 4:
        pipeline._encode_time.learn(tokens, tokens / 50)
    stages.gates["encode"].clear()
    pipeline.put([claim("first")], 5)
    until(lambda: stages.batches)
    pipeline.put([claim(f"job {n}") for n in range(30)], 150)
    time.sleep(0.05)
    stages.gates["encode"].set()
    assert pipeline.wait_until_empty(20)
    assert max(map(len, stages.batches)) == 10


def test_the_device_is_starved_only_while_there_is_work(stages: Recorder, start: Start) -> None:
    pipeline = start()
    pipeline.queue_is_empty(True)
    time.sleep(0.2)
    pipeline.queue_is_empty(False)
    time.sleep(0.3)
    stages.gates["encode"].clear()
    pipeline.put([claim("job")], 5)
    until(lambda: stages.batches)
    time.sleep(0.1)
    stages.gates["encode"].set()
    pipeline.queue_is_empty(True)
    assert pipeline.wait_until_empty(20)
    seconds = pipeline.device_time.seconds
    assert seconds["idle"] >= 0.2
    assert seconds["starved"] >= 0.3
    assert seconds["encoding"] >= 0.1
    assert 0 < pipeline.device_time.starved_share < 1


def test_long_jobs_are_begun_only_a_few_at_a_time(stages: Recorder, start: Start) -> None:
    pipeline = start(prefetch_tokens=10_000)
    stages.gates["encode"].clear()
    put = 0
    while pipeline.wait_for_room(0.3):
        pipeline.put([claim(f"long {put}", "/".join(["one two three"] * 30))], 150)
        until(lambda: not pipeline._claimed_tokens)
        put += 1
        assert put < 50
    assert put <= MAX_LONG_JOBS + 1  # the first may be on the device
    stages.gates["encode"].set()
    assert pipeline.wait_until_empty(20)


def test_a_claim_of_more_than_goes_into_memory_is_tokenized_piece_by_piece(
    stages: Recorder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "MAX_READY_TOKENS", 0)
    whole, tokenized = stages.tokenize, 0

    def one_at_a_time(claims: Sequence[Claim]) -> tuple[list[Work], list[Outcome], Sequence[Claim]]:
        nonlocal tokenized
        tokenized += 1
        return whole(claims[:1])[0], [], claims[1:]

    monkeypatch.setattr(stages, "tokenize", one_at_a_time)
    pipeline = start(prefetch_tokens=100)
    stages.gates["encode"].clear()
    names = [f"job {n}" for n in range(100)]
    pipeline.put([claim(name) for name in names], 100)
    until(lambda: pipeline._is_encoding and pipeline._ready.num_tokens >= 100)
    time.sleep(0.1)
    # On the device, cut for it, and ready: five tokens each.
    assert tokenized <= 10 + 10 + 20
    stages.gates["encode"].set()
    assert pipeline.wait_until_empty(20)
    assert sorted(stages.published) == sorted(names)


def test_a_pipeline_that_stops_in_the_middle_of_a_claim_leaves_the_rest_alone(
    stages: Recorder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "MAX_READY_TOKENS", 0)
    whole = stages.tokenize
    monkeypatch.setattr(stages, "tokenize", lambda claims: (whole(claims[:1])[0], [], claims[1:]))
    pipeline = start(prefetch_tokens=50)
    stages.gates["encode"].clear()
    pipeline.put([claim(f"job {n}") for n in range(100)], 100)
    until(lambda: pipeline._is_encoding and pipeline._ready.num_tokens >= 50)
    pipeline.ask_to_stop()
    stages.gates["encode"].set()
    pipeline.stop()
    assert 0 < len(stages.published) < 100
