"""`embed_stream` and `as_completed`: any number of texts with a bounded number under way; the vector cache."""

from __future__ import annotations

import itertools
import threading
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.model import NoopEncoder
from embedq.producer import (
    Embeddings,
    EmbedOptions,
    EmbedQueue,
    InvalidOptionError,
    InvalidTextError,
    JobCanceledError,
    JobFailedError,
    JobStatus,
    QueueFull,
    ResultTimeoutError,
    TextEmbedding,
    calls,
    keys,
)
from embedq.producer.places import OneRedis
from embedq.producer.settings import RESULT_TTL_S, JobSettings
from embedq.producer.streaming import StreamSettings, TextStream
from tests.conftest import Drain, until
from tests.queue.test_worker import Start, start  # noqa: F401


def vectors(texts: list[str]) -> np.ndarray:
    encoder = NoopEncoder(8)
    return encoder.postprocess(encoder.encode_tokens(encoder.tokenize(texts)))


def count_calls(queue: EmbedQueue, script: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each call of a script from now on."""
    names: list[str] = []
    do = queue._do

    def counted(step: calls.Step) -> object:
        if isinstance(step, calls.ScriptCall) and step.script == script:
            names.append(step.script)
        return do(step)

    monkeypatch.setattr(queue, "_do", counted)
    return names


# --- the stream


@pytest.mark.parametrize("ordered", [True, False])
def test_every_text_comes_out_once_with_its_vector(queue: EmbedQueue, start: Start, ordered: bool) -> None:  # noqa: F811
    start()
    texts = [f"text {number}" for number in range(3000)]
    items = list(queue.embed_stream(iter(texts), window=500, ordered=ordered, texts_per_job=7, timeout=30))
    if ordered:
        assert [item.index for item in items] == list(range(3000))
    found = sorted(items, key=lambda item: item.index)
    np.testing.assert_allclose(np.stack([item.vector for item in found]), vectors(texts), atol=1e-7)
    assert {(item.num_tokens, item.truncated, item.model, item.error) for item in items} == {(4, False, "noop:8", None)}


def test_a_long_stream_has_a_bounded_number_of_texts_under_way_and_leaves_nothing_behind(
    queue: EmbedQueue,
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start()
    start()
    number, window = 100_000, 2048
    enqueues = count_calls(queue, "enqueue", monkeypatch)
    taken = handed_out = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for taken in range(1, number + 1):
            yield f"short text {taken}"

    memory: list[int] = []
    tracemalloc.start()
    for item in queue.embed_stream(texts(), window=window, timeout=60):
        assert item.index == handed_out
        assert taken - handed_out <= window
        handed_out += 1
        if handed_out % 1000 == 0:
            memory.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert handed_out == number
    assert max(memory) < 5_000_000  # bytes; all results together have 60 million
    assert len(enqueues) <= 4 * number / window + 1
    assert queue._redis.keys("rq:job:*") == queue._redis.keys("rq:results:*") == []
    assert queue._redis.zcard(keys.finished("embed")) == queue.depth() == 0


def test_results_that_others_may_want_stay_for_their_time(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    start()
    assert len(list(queue.embed_stream(iter("abc"), texts_per_job=2, group="mine", timeout=20))) == 3
    members = queue._redis.smembers(keys.group("mine"))
    assert len(members) == 2
    assert all(0 < queue._redis.ttl(keys.job(member.decode())) <= RESULT_TTL_S for member in members)


def test_leaving_a_stream_early_cancels_what_still_waits(queue: EmbedQueue, drain: Drain) -> None:
    stream = queue.embed_stream((str(number) for number in itertools.count()), window=8, texts_per_job=1)
    with pytest.raises(ResultTimeoutError, match="no text of the stream came back for 0 s"):
        next(queue.embed_stream(["a"], timeout=0))
    assert queue.depth() == 0
    assert queue._redis.zcard(keys.canceled("embed")) == 1
    do = queue._do

    def works_meanwhile(step: calls.Step) -> object:
        reply = do(step)
        if isinstance(step, calls.ScriptCall) and queue.depth() == 8:
            drain(max_jobs=3)
        return reply

    queue._do = works_meanwhile  # type: ignore[method-assign]
    assert next(stream).index == 0
    stream.close()  # type: ignore[attr-defined]
    assert queue.depth() == 0
    assert queue._redis.zcard(keys.canceled("embed")) == 1 + 5


def test_an_error_of_the_source_cancels_and_passes_through(queue: EmbedQueue) -> None:
    def breaks() -> Iterator[str]:
        yield from "abcd"
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(queue.embed_stream(breaks(), window=16, texts_per_job=1))
    assert queue.depth() == 0


def test_a_text_that_fails_ends_the_stream_where_its_job_begins(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    start()
    texts = ["short"] * 70 + ["word " * 1000] + ["short"] * 500
    stream = queue.embed_stream(texts, truncate=False, texts_per_job=16, timeout=30)
    seen = []
    with pytest.raises(JobFailedError) as caught:
        seen.extend(item.index for item in stream)
    assert caught.value.text_index == 70
    assert caught.value.code == "text_too_long"
    assert seen == list(range(64))
    assert queue.depth() == 0
    with pytest.raises(InvalidTextError, match="takes any number of texts"):
        queue.embed_stream("one text")
    bad = queue.embed_stream(["a", None, "b"], timeout=20)  # type: ignore[list-item]
    assert next(bad).index == 0
    with pytest.raises(InvalidTextError, match="text 1 is NoneType"):
        next(bad)


def test_bad_texts_can_come_out_as_items_and_harm_no_other(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    start()
    long = "word " * 1000
    texts = ["a", long, "b", None, long, "c"]
    for ordered in (True, False):
        items = list(queue.embed_stream(texts, truncate=False, on_error="yield", ordered=ordered, timeout=30))  # type: ignore[arg-type]
        found = sorted(items, key=lambda item: item.index)
        if ordered:
            assert items == found
        errors = [type(item.error).__name__ for item in found]
        assert errors == ["NoneType", "JobFailedError", "NoneType", "InvalidTextError", "JobFailedError", "NoneType"]
        assert [item.error.text_index for item in found if item.error] == [1, 3, 4]  # type: ignore[attr-defined]
        assert [item.vector.shape for item in found] == [(8,), (0,), (8,), (0,), (0,), (8,)]
        good = np.stack([item.vector for item in found if not item.error])
        np.testing.assert_allclose(good, vectors(["a", "b", "c"]), atol=1e-7)


def test_token_output_streams_too(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    start()
    items = list(queue.embed_stream(["one", "two words"], output="tokens", timeout=20))
    assert [item.vector.shape for item in items] == [(3, 8), (4, 8)]


def test_the_same_stream_again_under_dedupe_enqueues_nothing(queue: EmbedQueue, drain: Drain) -> None:
    texts = [f"text {number}" for number in range(300)]
    for start_of_job in range(0, 300, 64):
        queue.enqueue(texts[start_of_job : start_of_job + 64], dedupe=True)
    drain()
    items = list(queue.embed_stream(texts, dedupe=True, timeout=1))
    assert [item.index for item in items] == list(range(300))
    assert queue.depth() == 0
    failed = queue.enqueue("again", dedupe=True)
    failed.cancel()
    with pytest.raises(ResultTimeoutError):  # started afresh: its old cancellation is no news
        next(queue.embed_stream(["again"], dedupe=True, timeout=0.1))
    assert failed.status() is JobStatus.QUEUED


def test_a_stream_waits_for_room_or_says_that_there_is_none(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    queue.enqueue_many(list("abcd"))
    with pytest.raises(QueueFull):
        next(queue.embed_stream(["x"], max_depth=4))
    start()
    items = list(
        queue.embed_stream(
            map(str, range(200)), texts_per_job=1, window=100, max_depth=10, block_timeout=20, timeout=20
        )
    )
    assert len(items) == 200


@pytest.mark.parametrize(
    "keywords",
    [
        {"window": 0},
        {"texts_per_job": 2000},
        {"on_error": "ignore"},
        {"cache_ttl": 5},
        {"cache_ttl": 0, "model": "m"},
        {"dimensions": 0},
    ],
)
def test_what_cannot_be_is_refused_before_the_first_text_is_taken(queue: EmbedQueue, keywords: dict) -> None:
    def never() -> Iterator[str]:
        raise AssertionError("taken")
        yield ""

    with pytest.raises(InvalidOptionError, match=next(iter(keywords))):
        queue.embed_stream(never(), **keywords)


# --- its pure half


class Workers:
    """Does a stream's steps, and ends jobs in any order, some of them badly."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.waiting: dict[str, list[str]] = {}
        self.most_under_way = 0

    def run(self, operation: calls.Operation[calls.WaitFor]) -> None:
        try:
            step = next(operation)
            while True:
                assert isinstance(step, calls.ScriptCall)
                step = operation.send([b"done"])
        except StopIteration as end:
            for job_id in (*end.value.fresh, *end.value.known):
                [part] = self.stream._parts[job_id]
                self.waiting[job_id] = part.texts

    def end_one(self, place: int) -> None:
        job_id = list(self.waiting)[place % len(self.waiting)]
        texts = self.waiting.pop(job_id)
        bad = next((index for index, text in enumerate(texts) if text == "bad"), None)
        if bad is not None:
            self.run(self.stream.take([(job_id, JobFailedError("no", text_index=bad))]))
            return
        numbers = np.asarray([[float(text)] for text in texts], np.float32)
        result = Embeddings(vectors=numbers, num_tokens=(1,) * len(texts), truncated=(False,) * len(texts), model="m")
        self.run(self.stream.take([(job_id, result)]))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.booleans(), max_size=40),
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
    st.lists(st.integers(0, 99), min_size=1, max_size=30),
)
def test_each_text_comes_out_once_however_jobs_end(
    fine: list[bool], window: int, texts_per_job: int, ordered: bool, ends: list[int]
) -> None:
    how = StreamSettings(window=window, texts_per_job=texts_per_job, ordered=ordered, on_error="yield")
    stream = TextStream(OneRedis("embed"), EmbedOptions(), JobSettings(), how)
    workers = Workers(stream)
    source = iter([str(number) if good else "bad" for number, good in enumerate(fine)])
    items: list[TextEmbedding] = []
    order = itertools.cycle(ends)
    taken = 0
    while True:
        texts = list(itertools.islice(source, stream.room))
        taken += len(texts)
        workers.run(stream.fill(texts))
        items += stream.pop_ready()
        assert taken - len(items) <= window
        if not workers.waiting and taken == len(fine):
            break
        if workers.waiting:
            workers.end_one(next(order))
            items += stream.pop_ready()
    assert stream.is_empty
    assert stream.waiting_jobs() == []
    indices = [item.index for item in items]
    assert sorted(indices) == list(range(len(fine)))
    assert not ordered or indices == sorted(indices)
    assert all((item.error is None) == fine[item.index] for item in items)
    assert all(item.vector[0] == item.index for item in items if item.error is None)


# --- as completed


def test_jobs_come_as_they_end_with_what_became_of_them(queue: EmbedQueue, drain: Drain) -> None:
    first, bad, last = queue.enqueue("a"), queue.enqueue("b", dimensions=99), queue.enqueue("c")
    drain(max_jobs=2)
    waiting = queue.as_completed([last, first.id, bad, first], timeout=0.05)
    found = list(waiting)
    assert {job.id for job, _ in found[:2]} == {first.id, bad.id}
    assert [type(outcome).__name__ for _, outcome in found[2:]] == ["ResultTimeoutError"]
    assert found[2][0] == last
    last.cancel()
    [(job, outcome)] = queue.as_completed([last])
    assert job == last
    assert isinstance(outcome, JobCanceledError)


def test_jobs_behind_many_that_do_not_end_come_all_the_same(queue: EmbedQueue, drain: Drain, url: str) -> None:
    stuck = queue.enqueue_many(["later"] * 300, delay=3600)
    quick = queue.enqueue_many(["a"] * 5)
    found: list[str] = []

    def wait() -> None:
        with EmbedQueue(url) as other:
            completed = other.as_completed([*stuck, *quick], timeout=20)
            found.extend(job.id for job, _ in itertools.islice(completed, 5))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    drain()
    thread.join(25)
    assert set(found) == {job.id for job in quick}


# --- the vector cache


def test_only_texts_that_the_cache_lacks_are_enqueued(
    queue: EmbedQueue,
    start: Start,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start()
    texts = [f"text {number}" for number in range(600)]
    options = {"model": "noop:8", "cache_ttl": 100, "timeout": 30}
    cold = queue.embed(texts[:400], **options)  # type: ignore[arg-type]
    enqueues = count_calls(queue, "enqueue", monkeypatch)
    warm = queue.embed(texts[:400], **options)  # type: ignore[arg-type]
    assert enqueues == []
    np.testing.assert_array_equal(cold.vectors, warm.vectors)
    assert (cold.num_tokens, cold.truncated, cold.model) == (warm.num_tokens, warm.truncated, warm.model)
    mixed = list(queue.embed_stream(texts[::-1], window=256, **options))  # type: ignore[arg-type]
    np.testing.assert_allclose(np.stack([item.vector for item in mixed]), vectors(texts[::-1]), atol=1e-7)
    entries = queue._redis.keys(keys.vector("*"))
    assert len(entries) == 600
    assert all(0 < queue._redis.ttl(key) <= 100 for key in entries)
    assert queue.embed(texts[100:101], timeout=30, **{k: options[k] for k in ("model", "cache_ttl")}).worker == ""  # type: ignore[arg-type]


def test_vectors_of_other_options_or_models_never_mix(queue: EmbedQueue, drain: Drain) -> None:
    def cached(**options: object) -> Embeddings | None:
        try:
            return queue.embed("a", cache_ttl=100, timeout=0, **options)  # type: ignore[arg-type]
        except ResultTimeoutError:
            return None

    with pytest.raises(InvalidOptionError, match="cache_ttl needs model"):
        queue.embed("a", cache_ttl=100)
    queue.enqueue("a", model="noop:8", dedupe=True)
    drain()
    assert cached(model="noop:8", dedupe=True) is not None
    assert cached(model="noop:8") is not None
    assert cached(model="noop:8", dimensions=4) is None
    assert cached(model="noop:16") is None
    [entry] = queue._redis.keys(keys.vector("*"))
    queue._redis.set(entry, b"rubbish")
    assert cached(model="noop:8") is None


def test_a_failure_behind_cached_texts_names_the_right_one(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    start()
    options = {"model": "noop:8", "cache_ttl": 100, "timeout": 30, "truncate": False}
    queue.embed(["a", "b"], **options)  # type: ignore[arg-type]
    with pytest.raises(JobFailedError) as caught:
        queue.embed(["a", "c", "b", "word " * 1000], **options)  # type: ignore[arg-type]
    assert caught.value.text_index == 3
    with pytest.raises(JobFailedError) as caught:
        queue.embed(["a"] * 100 + ["word " * 1000], truncate=False, timeout=30)
    assert caught.value.text_index == 100
    until(lambda: queue.depth() == 0)


def test_a_result_parts_into_texts_and_joins_again() -> None:
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    tokens = Embeddings(vectors=rows, num_tokens=(3, 2), truncated=(False, True), model="m", output="tokens")
    assert [len(part.vectors) for part in tokens.split()] == [3, 2]
    again = Embeddings.concatenate(tokens.split())
    np.testing.assert_array_equal(again.vectors, rows)
    assert (again.num_tokens, again.truncated) == (tokens.num_tokens, tokens.truncated)
