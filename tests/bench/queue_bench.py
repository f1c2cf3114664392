"""The queue beside stock RQ: the same jobs, the same results, one process each, on a private Redis.

Both sides serve the stand-in model, so that what is measured is the queue.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import redis
from rq import Queue, SimpleWorker

from embedq.producer import EmbedQueue, EmbedSerializer, keys, wire
from embedq.producer.connection import connect
from embedq.worker import EmbedWorker, WorkerSettings
from embedq.worker.redis_server import RedisServer
from tests.bench import measure

MODEL = "noop:768"
JOBS = 4000
#: Stock RQ is slower; fewer jobs give the same rate.
STOCK_JOBS = 400
TEXTS_PER_JOB = 64


def run() -> None:
    logging.disable(logging.INFO)
    os.environ["EMBEDQ_MODEL"] = MODEL
    with tempfile.TemporaryDirectory(prefix="eq-") as folder, RedisServer(Path(folder)) as server:
        client = connect(server.url)
        _enqueue(client)
        _drain(client)


def _enqueue(client: redis.Redis) -> None:
    ours = EmbedQueue(connection=client)
    theirs = Queue("embed", connection=client, serializer=EmbedSerializer)
    texts = [f"text number {number}" for number in range(JOBS)]

    def theirs_many() -> None:
        theirs.enqueue_many([Queue.prepare_data(wire.FUNCTION, kwargs={"texts": [text]}) for text in texts])

    def one_by_one(enqueue: Callable[[str], object]) -> Callable[[], None]:
        return lambda: [enqueue(text) for text in texts[:STOCK_JOBS]] and None

    single = {
        "embedq enqueue": _rate(client, STOCK_JOBS, one_by_one(ours.enqueue)),
        "rq enqueue": _rate(
            client, STOCK_JOBS, one_by_one(lambda text: theirs.enqueue(wire.FUNCTION, kwargs={"texts": [text]}))
        ),
    }
    many = {
        "embedq enqueue_many": _rate(client, JOBS, lambda: ours.enqueue_many(texts)),
        "rq enqueue_many": _rate(client, JOBS, theirs_many),
    }
    measure.show("Enqueue, one text a job", "jobs/s", measure.interleaved(single), "rq enqueue")
    measure.show("Enqueue many, one text a job", "jobs/s", measure.interleaved(many), "rq enqueue_many")


def _rate(client: redis.Redis, number: int, action: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        client.flushall()
        return number / measure.seconds(action)

    return once


def _drain(client: redis.Redis) -> None:
    queue = EmbedQueue(connection=client)

    def ours() -> None:
        EmbedWorker(["embed"], connection=client, settings=WorkerSettings(model=MODEL)).work(burst=True)

    def stock() -> None:
        SimpleWorker(["embed"], connection=client, serializer=EmbedSerializer).work(burst=True)

    rows = measure.interleaved(
        {
            "embedq worker": lambda: _drained(queue, ours, JOBS, 1),
            "rq SimpleWorker": lambda: _drained(queue, stock, STOCK_JOBS, 1),
        }
    )
    measure.show("Drain, one text a job, 768 float32 back", "jobs/s", rows, "rq SimpleWorker")
    rows = measure.interleaved(
        {
            "embedq worker": lambda: TEXTS_PER_JOB * _drained(queue, ours, JOBS // 8, TEXTS_PER_JOB),
            "rq SimpleWorker": lambda: TEXTS_PER_JOB * _drained(queue, stock, STOCK_JOBS // 4, TEXTS_PER_JOB),
        }
    )
    measure.show(f"Drain, {TEXTS_PER_JOB} texts a job", "texts/s", rows, "rq SimpleWorker")


def _drained(queue: EmbedQueue, work: Callable[[], None], jobs: int, texts_per_job: int) -> float:
    """Jobs a second, without what a worker takes to start and stop: an empty run is subtracted."""
    queue._client.flushall()
    empty_s = measure.seconds(work)
    for number in range(jobs):
        queue.enqueue([f"text {number} {place}" for place in range(texts_per_job)])
    took_s = measure.seconds(work)
    done = queue._redis.zcard(keys.finished(queue.name))
    if done != jobs:
        raise RuntimeError(f"{done} of {jobs} jobs are finished: the figure would mean nothing")
    return jobs / max(1e-9, took_s - empty_s)


if __name__ == "__main__":
    run()
