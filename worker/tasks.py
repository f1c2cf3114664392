"""The function that every job names: what a stock `rq worker` runs, one job at a time.

rq worker -S embedq.producer.serializer.EmbedSerializer embed

`EmbedWorker` never calls it; it does the same work in micro-batches over many jobs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import JobFailedError, WireError
from embedq.producer.wire import check_kwargs
from embedq.worker.encoders import load_encoder
from embedq.worker.engine import Engine
from embedq.worker.settings import WorkerSettings


def embed(**kwargs: Any) -> Embeddings:
    """One request's embeddings; the model is EMBEDQ_MODEL's, loaded once a process. Raises JobFailedError."""
    try:
        request = check_kwargs(kwargs)
    except WireError as err:
        raise JobFailedError(str(err), code=err.code) from err
    return _engine().run(request)


@cache
def _engine() -> Engine:
    settings = WorkerSettings.from_environment()
    return Engine(load_encoder(settings), settings.max_batch_tokens, worker_name="rq")
