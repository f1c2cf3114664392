"""The worker: drains queues in micro-batches. `rq worker --worker-class embedq.worker.EmbedWorker` runs it too.

Importing it loads no model and no torch; that happens when the worker starts to work.
"""

from embedq.worker.settings import WorkerSettings
from embedq.worker.worker import EmbedWorker

__all__ = ["EmbedWorker", "WorkerSettings"]
