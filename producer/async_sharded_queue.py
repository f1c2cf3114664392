"""The awaiting client of several Redis servers: `AsyncEmbedQueue`'s surface over a client for each.

Knows how the steps of all shards are done at once; what is asked of which is in `sharded_place`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from embedq.producer import calls
from embedq.producer.async_queue import AsyncEmbedQueue
from embedq.producer.calls import News, WaitFor
from embedq.producer.client import DEFAULT_QUEUE, check_queue_name
from embedq.producer.errors import EmbedqError
from embedq.producer.mailbox import Mailbox
from embedq.producer.rendezvous import Rendezvous
from embedq.producer.sharded_place import ShardedPlace
from embedq.producer.sharded_results import ShardedReader
from embedq.producer.shards import ShardUrls, shard_urls


class AsyncShardedEmbedQueue(AsyncEmbedQueue):
    """See `ShardedEmbedQueue`; to be used as `AsyncEmbedQueue`."""

    _place: ShardedPlace

    def __init__(
        self,
        urls: ShardUrls,
        *,
        queue: str = DEFAULT_QUEUE,
        max_depth: int | None = None,
        block_timeout: float = 0,
    ) -> None:
        by_name = shard_urls(urls)
        shards = Rendezvous(by_name)
        place = ShardedPlace(check_queue_name(queue), shards)
        self._begin(place, {"max_depth": max_depth, "block_timeout": block_timeout})
        self._shards = {name: AsyncEmbedQueue(url, queue=queue) for name, url in by_name.items()}
        self._reader = ShardedReader(shards, {name: shard._reader for name, shard in self._shards.items()})

    def id_beside(self, job_id: str) -> str:
        """See `ShardedEmbedQueue.id_beside`."""
        return self._place.id_beside(job_id)

    async def close(self) -> None:
        """Closes the connections. Who still waits raises QueueConnectionError."""
        for shard in self._shards.values():
            await shard.close()

    async def _do(self, step: calls.Step, call: Mailbox) -> Any:
        if isinstance(step, calls.Fork):
            return await self._fork(step)
        if isinstance(step, (News, WaitFor, calls.Pause)):
            return await super()._do(step, call)
        raise AssertionError("each step is one shard's")

    async def _fork(self, step: calls.Fork) -> dict[str, Any]:
        """All to their ends, also where one of them breaks: a caller is to know what became of each."""
        running = [self._shards[shard]._run(operation) for shard, operation in step.operations.items()]
        replies = await asyncio.gather(*running, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, EmbedqError):
                raise reply
        return dict(zip(step.operations, replies, strict=True))
