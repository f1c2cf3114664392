"""Put texts on a queue and get embeddings back; needs Redis, no torch.

q = EmbedQueue("redis://localhost:6379/0")
job = q.enqueue("a text")
job.result(timeout=30).vectors
"""

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
    PartialEnqueueError,
    QueueAccessError,
    QueueConnectionError,
    QueueFull,
    QueueServerError,
    ResultTimeoutError,
    WireError,
)
from embedq.producer.jobs import EmbedJob
from embedq.producer.options import EmbedOptions
from embedq.producer.queue import EmbedQueue
from embedq.producer.serializer import EmbedSerializer
from embedq.producer.status import JobStatus

__all__ = [
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
    "JobNotFoundError",
    "JobStateError",
    "JobStatus",
    "PartialEnqueueError",
    "QueueAccessError",
    "QueueConnectionError",
    "QueueFull",
    "QueueServerError",
    "ResultTimeoutError",
    "Timings",
    "WireError",
]
