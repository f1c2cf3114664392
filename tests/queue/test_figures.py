"""A worker's figures: right, written where the fleet's lookers find them, and only when something has changed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from embedq.producer import EmbedQueue, keys
from embedq.producer.connection import connect
from embedq.producer.figures import read_figures
from embedq.worker.claims import Claim, Outcome
from embedq.worker.estimates import Capacity
from embedq.worker.settings import WorkerSettings
from embedq.worker.telemetry.figures import Figures
from embedq.worker.telemetry.monitor import Monitor
from embedq.worker.telemetry.observer import Encoded
from tests.conftest import Drain, until
from tests.queue.watched_worker import watched


class StandIn:
    """A worker of which the test says what it is at."""

    def __init__(self) -> None:
        self.encoded_s = 0.0
        self.held = 0

    def encoding_s(self) -> float:
        return self.encoded_s

    def num_held(self) -> int:
        return self.held

    def prefetched_tokens(self) -> int:
        return 7

    def tokens_per_byte(self) -> float:
        return 0.25


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def outcome(became: Any, num_texts: int = 2) -> Outcome:
    claim = Claim("embed", "id", "execution", b"", 0.0, num_texts=num_texts)
    return Outcome(claim, "finished", b"", became=became)


def encode(figures: Figures, num_tokens: int, took_s: float) -> None:
    figures.encoded(Encoded([], [], num_tokens, 0.0, took_s))


def test_recent_figures_are_of_the_last_seconds_and_capacity_of_the_time_at_work() -> None:
    worker, clock = StandIn(), Clock()
    figures = Figures(worker, clock)
    figures.serve(1000, {"dtype": "float16"})
    for _ in range(20):
        clock.now += 1.0
        worker.encoded_s += 0.25
        encode(figures, 500, 0.25)
        figures.sample()
    look = figures.look()
    assert look["tokens"] == 10_000
    assert look["tokens_per_s"] == pytest.approx(2000)
    assert look["recent_tokens_per_s"] == pytest.approx(500)
    assert look["busy"] == pytest.approx(0.25)
    assert look["fill"] == pytest.approx(0.5)
    assert figures.idle_ratio() == pytest.approx(0.75)
    assert look["dtype"] == "float16"


def test_figures_settle_when_nothing_happens_and_capacity_stays() -> None:
    worker, clock = StandIn(), Clock()
    figures = Figures(worker, clock)
    figures.serve(1000, {})
    encode(figures, 500, 0.25)
    looks = []
    for _ in range(90):
        clock.now += 1.0
        figures.sample()
        looks.append(figures.look())
    assert looks[0] != looks[20] == looks[-1]
    assert (looks[-1]["recent_tokens_per_s"], looks[-1]["fill"], looks[-1]["busy"]) == (0, 0, 0)
    assert looks[-1]["tokens_per_s"] == pytest.approx(2000)


def test_jobs_texts_and_errors_are_those_that_redis_took() -> None:
    figures = Figures(StandIn(), Clock())
    figures.published([outcome(became) for became in ("finished", "failed", "retried", "parked", "canceled", "")], 0.1)
    look = figures.look()
    assert (look["jobs"], look["texts"], look["errors"]) == (2, 4, 2)


def test_small_micro_batches_say_little_of_what_a_device_can() -> None:
    capacity = Capacity(16_384)
    assert capacity.tokens_per_s == 0
    for _ in range(10):
        capacity.learn(16_384, 0.1)
    full = capacity.tokens_per_s
    for _ in range(1000):
        capacity.learn(20, 0.005)
    assert full == pytest.approx(163_840)
    assert capacity.tokens_per_s > 0.9 * full
    for _ in range(640):
        capacity.learn(16_384, 0.2)
    assert capacity.tokens_per_s == pytest.approx(full / 2, rel=0.05)


def test_a_worker_brings_its_figures_along_and_keeps_them_up_to_date(url: str, queue: EmbedQueue) -> None:
    with watched(url) as watched_worker:
        key = keys.worker(watched_worker.worker.name)

        def figures() -> Any:
            return read_figures(queue._redis.hget(key, "embedq_figures"))

        assert figures().jobs == 0
        queue.enqueue(["two", "texts"]).result(timeout=20)
        until(lambda: figures().jobs == 1)
        found = figures()
        assert (found.texts, found.tokens, found.errors, found.held) == (2, 6, 0, 0)
        assert found.tokens_per_s > 0
        assert found.wire == 1
        assert found.dtype == "float32"
        assert abs(found.time - time.time()) < 60


def test_only_what_is_new_is_written_and_a_forgotten_worker_leaves_nothing_behind(url: str) -> None:
    with connect(url) as client, Monitor(WorkerSettings(model="noop:8"), "w1", ["embed"], client) as monitor:
        key = keys.worker("w1")

        def tell() -> int:
            """How many commands that took."""
            monitor._next_telling = 0.0
            before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
            monitor.tell()
            return int(client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0) - before)

        tell()
        assert not client.exists(key)
        client.hset(key, "birth", "now")
        assert tell() == 1
        assert read_figures(client.hget(key, "embedq_figures"))
        assert tell() == 0
        client.delete(key)
        monitor.observer.published([outcome("finished")], 0.1)
        tell()
        assert not client.exists(key)
        client.hset(key, "birth", "again")
        tell()
        assert read_figures(client.hget(key, "embedq_figures")).jobs == 1  # type: ignore[union-attr]


def test_the_counts_of_a_worker_are_of_what_redis_took(queue: EmbedQueue, drain: Drain) -> None:
    queue.enqueue_many(["a", "b"])
    worker = drain()
    assert worker.successful_job_count == 2
    assert worker.monitor._figures.look()["jobs"] == 2
    assert np.isfinite(worker.monitor._figures.tokens_per_s)
