"""celery in one process without events, gossip and heartbeats, and celery-batches on the same settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import stand_in
from celery import Celery
from celery_batches import Batches

PACKAGES = ("celery", "redis")
BATCHES_PACKAGES = ("celery-batches", *PACKAGES)
#: Beside the messages' database, so that results can be counted.
RESULTS_DATABASE = 1
#: Messages that the worker takes before it has done the first; 0 is without a bound.
PREFETCH = 0
#: Jobs of one batch, and seconds after which a smaller one is done.
BATCH_JOBS, BATCH_S = 100, 0.1
WORKER = (
    *("worker", "--pool", "solo", "--loglevel", "WARNING"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)
CONFIGURATION = {
    "accept_content": ["json", "pickle"],
    # Bytes as they are; JSON would write them in base64.
    "result_serializer": "pickle",
    "result_expires": 3600,
    "broker_connection_retry_on_startup": True,
    "worker_disable_rate_limits": True,
    "worker_enable_remote_control": False,
    "worker_prefetch_multiplier": PREFETCH,
    "worker_send_task_events": False,
}


class CeleryJobs:
    def __init__(self, url: str) -> None:
        self._app = Celery("bench", broker=url, backend=url.removesuffix("/0") + f"/{RESULTS_DATABASE}")
        self._app.conf.update(CONFIGURATION)
        self._embed = self._make_task()

    def _make_task(self) -> Any:
        return self._app.task(name="embed")(stand_in.embed)

    def enqueue(self, texts: Sequence[str]) -> Any:
        return self._embed.delay(texts)

    def result(self, job: Any, timeout_s: float) -> bytes:
        return bytes(job.get(timeout=timeout_s))

    def work(self) -> None:
        os.environ["C_FORCE_ROOT"] = "1"  # it would refuse to read pickle as root, in a container for one
        self._app.worker_main(list(WORKER))


class BatchesJobs(CeleryJobs):
    def _make_task(self) -> Any:
        def embed(requests: Sequence[Any]) -> None:
            for request in requests:
                self._app.backend.mark_as_done(request.id, stand_in.embed(*request.args), request=request)

        return self._app.task(name="embed", base=Batches, flush_every=BATCH_JOBS, flush_interval=BATCH_S)(embed)
