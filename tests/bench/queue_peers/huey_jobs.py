"""huey: a list that its consumer blocks on, results in a hash, pickle as it comes. A second thread gains a little."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import stand_in
from huey import RedisHuey

PACKAGES = ("huey", "redis")
NAME = "bench"
#: Found by trying 1, 2 and 4.
THREADS = 2
#: Seconds between looks at a result: huey polls, with longer and longer pauses by default.
LOOK_EVERY_S = 0.001


class HueyJobs:
    def __init__(self, url: str) -> None:
        self._huey = RedisHuey(NAME, url=url, blocking=True)
        self._embed = self._huey.task(name="embed")(stand_in.embed)

    def enqueue(self, texts: Sequence[str]) -> Any:
        return self._embed(texts)

    def result(self, job: Any, timeout_s: float) -> bytes:
        return bytes(job.get(blocking=True, timeout=timeout_s, backoff=1, max_delay=LOOK_EVERY_S))

    def work(self) -> None:
        logging.disable(logging.INFO)
        self._huey.create_consumer(workers=THREADS, worker_type="thread", periodic=False).run()
