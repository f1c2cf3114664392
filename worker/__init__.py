"""The worker: drains queues in micro-batches. `rq worker --worker-class embedq.worker.EmbedWorker` runs it too.

Importing it loads no model and no torch; that happens when the worker starts to work. Nor does it load RQ before
somebody asks for the worker: a probe (`embedq health`) starts a process every few seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedq.worker.settings import WorkerSettings
    from embedq.worker.worker import EmbedWorker

__all__ = ["EmbedWorker", "WorkerSettings"]


def __getattr__(name: str) -> Any:
    if name == "EmbedWorker":
        from embedq.worker.worker import EmbedWorker

        return EmbedWorker
    if name == "WorkerSettings":
        from embedq.worker.settings import WorkerSettings

        return WorkerSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
