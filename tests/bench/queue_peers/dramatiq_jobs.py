"""dramatiq with its default middleware and the results middleware: one process, and the threads that are its best."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

#: Messages fetched at once; read when dramatiq is imported. Its default is twice the threads.
os.environ.setdefault("dramatiq_queue_prefetch", "256")

import dramatiq
import stand_in
from dramatiq.brokers.redis import RedisBroker
from dramatiq.encoder import PickleEncoder
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

PACKAGES = ("dramatiq", "redis")
#: Found by trying 1, 2, 4 and 8.
THREADS = 4
#: Beside the messages' database, so that results can be counted.
RESULTS_DATABASE = 1
RESULT_TTL_MS = 3_600_000


class DramatiqJobs:
    def __init__(self, url: str) -> None:
        self._broker = RedisBroker(url=url)
        results = RedisBackend(url=url.removesuffix("/0") + f"/{RESULTS_DATABASE}", encoder=PickleEncoder())
        self._broker.add_middleware(Results(backend=results, store_results=True, result_ttl=RESULT_TTL_MS))
        dramatiq.set_broker(self._broker)
        self._embed = dramatiq.actor(stand_in.embed, actor_name="embed")

    def enqueue(self, texts: Sequence[str]) -> Any:
        return self._embed.send(texts)

    def result(self, job: Any, timeout_s: float) -> bytes:
        return bytes(job.get_result(block=True, timeout=int(timeout_s * 1000)))

    def work(self) -> None:
        dramatiq.Worker(self._broker, worker_threads=THREADS).start()
        threading.Event().wait()
