"""Stock RQ: its defaults, pickle included, without a log line per job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import redis
import stand_in
from rq import Queue, SimpleWorker, Worker

PACKAGES = ("rq", "redis")
QUEUE = "bench"


class RqJobs:
    worker_class: type[Worker]

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._queue = Queue(QUEUE, connection=self._client)

    def enqueue(self, texts: Sequence[str]) -> Any:
        return self._queue.enqueue(stand_in.embed, texts, result_ttl=3600)

    def enqueue_many(self, jobs: Sequence[Sequence[str]]) -> None:
        self._queue.enqueue_many([Queue.prepare_data(stand_in.embed, (texts,), result_ttl=3600) for texts in jobs])

    def result(self, job: Any, timeout_s: float) -> bytes:
        return bytes(job.latest_result(timeout=int(timeout_s)).return_value)

    def work(self) -> None:
        logging.disable(logging.INFO)
        self.worker_class([self._queue], connection=self._client).work(logging_level="WARNING")


class InProcess(RqJobs):
    worker_class = SimpleWorker


class Forking(RqJobs):
    worker_class = Worker
