"""A blocking client from a setting: of one server, or of several where EMBEDQ_URL or `--url` names several."""

from __future__ import annotations

from embedq.producer.client import DEFAULT_QUEUE
from embedq.producer.queue import EmbedQueue
from embedq.producer.shards import read_urls, split_urls


def open_queue(urls: str, queue: str = DEFAULT_QUEUE) -> EmbedQueue:
    """Raises ConfigurationError."""
    if split_urls(urls) == [urls]:
        return EmbedQueue(urls, queue=queue)
    from embedq.producer.sharded_queue import ShardedEmbedQueue

    return ShardedEmbedQueue(read_urls(urls), queue=queue)
