"""A look at a fleet: what waits, by a sample; who works, by what workers tell; whatever stands there."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
import redis
from rq.utils import utcformat

from embedq.producer import EmbedQueue, QueueConnectionError, fleet, keys
from embedq.producer.backlog import TOKENS_PER_BYTE, Backlog
from embedq.producer.connection import connect
from embedq.producer.figures import read_figures
from embedq.producer.waiting import LEAST_JOBS, SAMPLE_JOBS, SAMPLE_JOBS_OF_ALL, WaitingReader
from tests.queue.hostile import NONSENSE
from tests.queue.planted import FIGURES, plant_worker


@pytest.fixture
def client(each_url: str) -> Iterator[Any]:
    with connect(each_url) as client:
        yield client


def look_at(client: Any, name: str = "embed") -> fleet.QueueInfo:
    return next(queue for queue in fleet.look(client).queues if queue.name == name)


def commands(client: Any) -> dict[str, int]:
    """How often the server was asked what since its last reset."""
    stats = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}


def test_jobs_texts_and_bytes_of_a_short_queue_are_counted_exactly(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue(["a", "b", "c"])
        queue.enqueue_many(["d", "e"])
        queue.enqueue_in(1000, "later")
        queue.enqueue("after", depends_on=queue.enqueue("before"))
    client.zadd(keys.parked("embed"), {"x": 2, "y": 2})
    client.zadd(keys.failed("embed"), {"a": 1})
    seen = look_at(client)
    assert (seen.queued, seen.scheduled, seen.deferred, seen.parked, seen.failed) == (4, 1, 1, 2, 1)
    assert (seen.texts, seen.is_estimate) == (6, False)
    num_bytes = sum(
        client.hstrlen(keys.job(job_id.decode()), "data") for job_id in client.lrange("rq:queue:embed", 0, -1)
    )
    assert seen.tokens == round(num_bytes * TOKENS_PER_BYTE)


def test_the_oldest_job_is_as_old_as_it_says_by_the_servers_clock(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        old, *_ = queue.enqueue_many(["a", "b", "c"])
        for field in (b"2026-13-45T99:99:99Z", b"soon", b"", b"0", b"2" * 100):
            client.hset(keys.job(queue.enqueue("junk").id), "enqueued_at", field)
    now = client.time()[0]
    client.hset(keys.job(old.id), "enqueued_at", utcformat(datetime.fromtimestamp(now - 100, UTC)))
    age_s = look_at(client).oldest_age_s
    assert age_s is not None
    assert 99 <= age_s < 160


def test_an_empty_queue_has_no_age_and_no_backlog(client: Any) -> None:
    client.sadd(keys.QUEUES, keys.queue("embed"))
    seen = look_at(client)
    assert (seen.queued, seen.texts, seen.oldest_age_s, seen.backlog_s, seen.is_estimate) == (0, 0, 0.0, 0.0, False)


def plant_jobs(client: Any, texts_of: list[int], enqueued_at: str) -> None:
    """Jobs of so many texts, in order, with ten bytes of data a text."""
    for start in range(0, len(texts_of), 10_000):
        pipeline = client.pipeline(transaction=False)
        for place, texts in enumerate(texts_of[start : start + 10_000], start):
            fields = {"status": "queued", "embedq_texts": texts, "data": "x" * (10 * texts), "enqueued_at": enqueued_at}
            pipeline.hset(keys.job(f"{place:032x}"), mapping=fields)
        pipeline.rpush(
            keys.queue("embed"), *(f"{start + place:032x}" for place in range(len(texts_of[start : start + 10_000])))
        )
        pipeline.execute()
    client.sadd(keys.QUEUES, keys.queue("embed"))


def test_a_sample_of_a_hundred_thousand_jobs_comes_close_to_all_of_them(url: str) -> None:
    """Small jobs first, then a block of large ones, then a mixture: what a sample of the head alone would miss."""
    chance = random.Random(7)
    texts_of = [1] * 50_000 + [20] * 25_000 + [chance.randint(1, 10) for _ in range(25_000)]
    with connect(url) as client:
        plant_jobs(client, texts_of, "2026-01-31T23:59:59.123456Z")
        client.config_resetstat()
        seen = look_at(client)
        assert seen.queued == 100_000
        assert seen.is_estimate
        assert seen.texts == pytest.approx(sum(texts_of), rel=0.1)
        assert seen.tokens == pytest.approx(10 * TOKENS_PER_BYTE * sum(texts_of), rel=0.1)
        assert seen.oldest_age_s is not None
        assert seen.oldest_age_s > 0
        asked = commands(client)
    assert asked["hmget"] <= SAMPLE_JOBS
    assert asked["hstrlen"] <= SAMPLE_JOBS
    assert asked["lrange"] <= SAMPLE_JOBS // LEAST_JOBS


def test_of_a_list_too_long_to_walk_through_the_ends_are_looked_at(url: str) -> None:
    with connect(url) as client:
        pipeline = client.pipeline(transaction=False)
        for _ in range(200):
            pipeline.rpush(keys.queue("embed"), *["nobody"] * 10_000)
        pipeline.rpush(keys.queue("embed"), "last")
        pipeline.hset(keys.job("last"), mapping={"status": "queued", "data": "x", "embedq_texts": 3})
        pipeline.sadd(keys.QUEUES, keys.queue("embed"))
        pipeline.execute()
        client.config_resetstat()
        seen = look_at(client)
        assert seen.queued == 2_000_001
        assert seen.texts > 0
        assert commands(client)["hmget"] <= SAMPLE_JOBS


def test_many_queues_share_one_sample_and_one_round_trip(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_jobs(client, [2] * 100, "")
    ids = client.lrange(keys.queue("embed"), 0, -1)
    for number in range(600):
        client.rpush(keys.queue(f"q{number}"), *ids)
        client.sadd(keys.QUEUES, keys.queue(f"q{number}"))
        plant_worker(client, f"w{number}", queues=f"q{number}")
    fleet.look(client)
    trips = []
    execute = redis.client.Pipeline.execute
    monkeypatch.setattr(
        redis.client.Pipeline,
        "execute",
        lambda self, *a, **k: trips.append(len(self.command_stack)) or execute(self, *a, **k),
    )
    client.config_resetstat()
    seen = fleet.look(client)
    assert len(trips) == 3
    assert commands(client)["hmget"] <= max(SAMPLE_JOBS_OF_ALL, 601 * LEAST_JOBS)
    assert {queue.texts for queue in seen.queues} == {200}


def test_vanished_jobs_count_for_nothing(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue("a")
    client.rpush(keys.queue("embed"), "gone", "gone too", b"\xff\xfe")
    seen = look_at(client)
    assert (seen.queued, seen.texts) == (4, 1)


def test_a_lost_script_is_loaded_again(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue("a")
    reader = fleet.FleetReader(client)
    for _ in range(3):
        client.script_flush()
        assert reader.look().queues[0].texts == 1


def test_a_look_changes_nothing(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        queue.enqueue_many(["a", "b"], ttl=1000)
    plant_worker(client, "w")
    before = {key: client.dump(key) for key in client.keys("*")}
    fleet.look(client)
    assert {key: client.dump(key) for key in client.keys("*")} == before


@pytest.mark.parametrize("kind", ["string", "hash", "list", "zset"])
def test_keys_of_other_types_break_nothing(client: Any, each_url: str, kind: str) -> None:
    def plant(key: str) -> None:
        client.delete(key)
        {
            "string": lambda: client.set(key, "x"),
            "hash": lambda: client.hset(key, "x", "y"),
            "list": lambda: client.rpush(key, "x"),
            "zset": lambda: client.zadd(key, {"x": 1}),
        }[kind]()

    with EmbedQueue(each_url) as queue:
        queue.enqueue("a", job_id="a")
        queue.enqueue("b", job_id="b")
    plant_worker(client, "w")
    for key in (keys.job("a"), keys.worker("other"), keys.failed("embed"), keys.started("embed"), keys.parked("embed")):
        plant(key)
    client.sadd(keys.WORKERS, keys.worker("other"))
    seen = look_at(client)
    assert (seen.queued, seen.texts) == (2, 1 if kind != "hash" else seen.texts)
    plant(keys.queue("embed"))
    assert look_at(client).queued == (1 if kind == "list" else 0)
    for key in (keys.WORKERS, keys.QUEUES):
        plant(key)
    assert (fleet.look(client).queues, fleet.look(client).workers) == ([], [])


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_in_any_field_breaks_no_look(client: Any, each_url: str, value: bytes) -> None:
    with EmbedQueue(each_url) as queue:
        job = queue.enqueue("a")
        queue.enqueue(["b", "c"])
    client.hset(keys.job(job.id), mapping=dict.fromkeys(("embedq_texts", "enqueued_at", "status"), value))
    plant_worker(client, "good", tokens_per_s=10.0)
    names = ("state", "queues", "pid", "last_heartbeat", "embedq_figures", "embedq_model", "successful_job_count")
    client.hset(keys.worker("odd"), mapping=dict.fromkeys(names, value))
    client.sadd(keys.WORKERS, keys.worker("odd"))
    seen = fleet.look(client)
    assert len(seen.workers) == 2
    [of_queue] = seen.queues
    assert 2 <= of_queue.texts <= 2 + 1024
    assert math.isfinite(of_queue.backlog_s)
    assert orjson.loads(orjson.dumps(seen.to_plain()))["queues"][0]["queued"] == 2


def test_workers_tell_figures_and_one_that_is_silent_is_lost(client: Any) -> None:
    plant_worker(client, "a", tokens_per_s=12.5, fill=0.5, busy=2, held=3, errors=True)
    plant_worker(client, "b", silent_s=1000, tokens_per_s=12.5)
    client.hset(
        keys.worker("rq"), mapping={"state": "idle", "queues": "embed", "last_heartbeat": "2020-01-01T00:00:00Z"}
    )
    client.sadd(keys.WORKERS, keys.worker("rq"))
    told, lost, stock = fleet.look(client).workers
    assert told.figures is not None
    assert (told.figures.tokens_per_s, told.figures.fill, told.figures.busy, told.figures.held) == (12.5, 0.5, 1.0, 3)
    assert told.figures.errors == 0
    assert (told.state, lost.state, stock.state, stock.figures) == ("busy", "lost", "idle", None)
    assert lost.silent_s is not None
    assert lost.silent_s > 990


@pytest.mark.parametrize(
    "field",
    [
        *(None, b"", b"{", b"[]", b"1", b'"x"', b"{}", b'{"v": 2}', b'{"v": "1"}', b"\xff", b"[" * 4000, b"9" * 4000),
        orjson.dumps({**FIGURES, "version": "x" * 5000}),
    ],
)
def test_figures_of_another_version_and_junk_are_none(field: bytes | None) -> None:
    assert read_figures(field) is None


def test_figures_that_cannot_be_are_zero() -> None:
    odd: tuple[Any, ...] = (None, True, "1", [], {}, -1, 1e999)
    for value in odd:
        field = orjson.dumps({"v": 1, **{name: value for name in FIGURES if name != "v"}})
        read = read_figures(field)
        assert read is not None
        assert read.tokens_per_s == read.tokens_per_byte == read.time == 0.0
    assert read_figures(orjson.dumps({"v": 1, "tokens_per_byte": 1e9})) is not None


def test_the_backlog_is_tokens_over_the_rates_of_the_live_workers_of_the_queue(client: Any, each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        job = queue.enqueue("a")
    client.hset(keys.job(job.id), "data", "x" * 1000)
    reader = fleet.FleetReader(client)

    def backlog_s() -> float:
        return reader.look().queues[0].backlog_s

    assert backlog_s() == math.inf
    plant_worker(client, "fresh")
    assert backlog_s() == math.inf
    plant_worker(client, "a", tokens_per_s=10.0, tokens_per_byte=0.5)
    plant_worker(client, "b", tokens_per_s=30.0, tokens_per_byte=1.5)
    plant_worker(client, "other", queues="urgent", tokens_per_s=1e9)
    plant_worker(client, "lost", silent_s=1000, tokens_per_s=1e9)
    assert reader.look().queues[0].tokens == 1000
    assert reader.look().queues[0].tokens_per_s == 60.0  # the fresh one counts as the mean of the others
    assert backlog_s() == pytest.approx(1000 / 60)
    client.delete(keys.WORKERS)
    assert reader.look().queues[0].tokens_per_s == 0.0
    assert backlog_s() == pytest.approx(1000 / 60)  # nobody is there; what they were capable of is remembered
    assert fleet.look(client).queues[0].backlog_s == math.inf


def test_where_jobs_may_not_be_looked_at_they_count_as_those_done_before() -> None:
    backlog = Backlog()
    figures = read_figures(orjson.dumps({**FIGURES, "jobs": 10, "texts": 40, "tokens": 1000, "tokens_per_s": 50}))
    assert figures is not None
    load = backlog.load("embed", 5, None, [figures, None])
    assert (load.texts, load.tokens, load.tokens_per_s, load.backlog_s) == (20, 500, 100.0, 5.0)
    backlog.learn([figures])
    elsewhere = backlog.load("other", 5, None, [])
    assert (elsewhere.texts, elsewhere.tokens, elsewhere.backlog_s) == (20, 500, math.inf)


def test_an_error_other_than_a_denial_is_told(client: Any) -> None:
    with connect("unix:///nowhere/redis.sock") as nobody, pytest.raises(QueueConnectionError):
        fleet.look(nobody)
    reader = WaitingReader(client)
    client.script_flush()
    assert reader.read({}) == {}
    assert reader.read({"empty": 0})["empty"].texts == 0  # type: ignore[index]
