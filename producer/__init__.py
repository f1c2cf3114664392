"""Put texts on a queue and get embeddings back; needs Redis, no torch.

q = EmbedQueue("redis://localhost:6379/0")
job = q.enqueue("a text")
job.result(timeout=30).vectors

`AsyncEmbedQueue` has the same surface for event loops.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import (
    ConfigurationError,
    DuplicateJobError,
    EmbedqError,
    InvalidJobIdError,
    InvalidOptionError,
    InvalidRequestError,
    InvalidTextError,
    JobCanceledError,
    JobFailedError,
    JobNotFoundError,
    JobStateError,
    MixedResultsError,
    NewerVersionError,
    PartialEnqueueError,
    QueueAccessError,
    QueueConnectionError,
    QueueFull,
    QueueServerError,
    ResultTimeoutError,
    WireError,
)
from embedq.producer.groups import AsyncJobGroup, JobGroup
from embedq.producer.jobs import AsyncEmbedJob, EmbedJob
from embedq.producer.options import EmbedOptions
from embedq.producer.queue import EmbedQueue
from embedq.producer.serializer import EmbedSerializer
from embedq.producer.status import JobStatus
from embedq.producer.streaming import TextEmbedding

if TYPE_CHECKING:
    from embedq.producer.async_queue import AsyncEmbedQueue
    from embedq.producer.async_sharded_queue import AsyncShardedEmbedQueue
    from embedq.producer.sharded_queue import ShardedEmbedQueue

#: What is not needed by who talks to one server and blocks, by its module.
_LATER = {
    "AsyncEmbedQueue": "async_queue",
    "AsyncShardedEmbedQueue": "async_sharded_queue",
    "ShardedEmbedQueue": "sharded_queue",
}

__all__ = [
    "AsyncEmbedJob",
    "AsyncEmbedQueue",
    "AsyncJobGroup",
    "AsyncShardedEmbedQueue",
    "ConfigurationError",
    "DuplicateJobError",
    "EmbedJob",
    "EmbedOptions",
    "EmbedQueue",
    "EmbedSerializer",
    "Embeddings",
    "EmbedqError",
    "InvalidJobIdError",
    "InvalidOptionError",
    "InvalidRequestError",
    "InvalidTextError",
    "JobCanceledError",
    "JobFailedError",
    "JobGroup",
    "JobNotFoundError",
    "JobStateError",
    "JobStatus",
    "MixedResultsError",
    "NewerVersionError",
    "PartialEnqueueError",
    "QueueAccessError",
    "QueueConnectionError",
    "QueueFull",
    "QueueServerError",
    "ResultTimeoutError",
    "ShardedEmbedQueue",
    "TextEmbedding",
    "Timings",
    "WireError",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
