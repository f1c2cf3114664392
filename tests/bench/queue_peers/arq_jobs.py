"""arq: one event loop, many jobs at once, pickle as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import stand_in
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker

PACKAGES = ("arq", "redis")
#: Jobs that run at once, which is also how many it looks for in one go. Found by trying 10 to 300.
MAX_JOBS = 300
#: Seconds between looks at a result: arq polls, each half second by default.
LOOK_EVERY_S = 0.001


async def embed(context: dict[Any, Any], texts: Sequence[str]) -> bytes:
    return stand_in.embed(texts)


class ArqJobs:
    def __init__(self, url: str) -> None:
        self._settings = RedisSettings.from_dsn(url)
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._pool: Any = None

    def enqueue(self, texts: Sequence[str]) -> Any:
        return self._loop.run_until_complete(self._enqueue(texts))

    async def _enqueue(self, texts: Sequence[str]) -> Any:
        if self._pool is None:
            self._pool = await create_pool(self._settings)
        return await self._pool.enqueue_job("embed", texts)

    def result(self, job: Any, timeout_s: float) -> bytes:
        return bytes(self._loop.run_until_complete(job.result(timeout=timeout_s, poll_delay=LOOK_EVERY_S)))

    def work(self) -> None:
        logging.disable(logging.INFO)
        Worker([embed], redis_settings=self._settings, max_jobs=MAX_JOBS).run()
