"""A look at all queues and workers of one Redis, without changing anything.

RQ's own `rq info` cleans registries while it reads; this only counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import redis

from embedq.producer import keys
from embedq.producer.connection import translated_errors

#: Digits of a count that can be one.
MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """One queue; the numbers are jobs."""

    name: str
    queued: int
    started: int
    finished: int
    failed: int
    canceled: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One live worker, as it last reported itself."""

    name: str
    state: str
    queues: list[str]
    host: str
    pid: int
    #: empty for a stock RQ worker
    model: str
    device: str
    jobs_done: int
    jobs_failed: int
    last_heartbeat: str


@dataclass(frozen=True, slots=True)
class FleetInfo:
    queues: list[QueueInfo]
    workers: list[WorkerInfo]
    #: `rq suspend` is in force
    suspended: bool

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def look(client: redis.Redis) -> FleetInfo:
    """Three round trips, however many queues and workers there are. Raises QueueConnectionError."""
    connection: Any = client
    with translated_errors(client):
        pipeline = connection.pipeline(transaction=False)
        pipeline.smembers(keys.QUEUES).smembers(keys.WORKERS).exists(keys.SUSPENDED)
        queue_keys, worker_keys, suspended = pipeline.execute()
        names = sorted(keys.queue_name(key.decode(errors="replace")) for key in queue_keys)
        queues = _look_at_queues(connection, names)
        workers = _look_at_workers(connection, sorted(worker_keys))
    return FleetInfo(queues, workers, bool(suspended))


def _look_at_queues(connection: Any, names: list[str]) -> list[QueueInfo]:
    pipeline = connection.pipeline(transaction=False)
    for name in names:
        pipeline.llen(keys.queue(name))
        for registry in (keys.started, keys.finished, keys.failed, keys.canceled):
            pipeline.zcard(registry(name))
    counts = [_unless_foreign(reply, 0) for reply in pipeline.execute(raise_on_error=False)]
    return [QueueInfo(name, *counts[5 * place : 5 * place + 5]) for place, name in enumerate(names)]


def _look_at_workers(connection: Any, worker_keys: list[bytes]) -> list[WorkerInfo]:
    pipeline = connection.pipeline(transaction=False)
    for key in worker_keys:
        pipeline.hgetall(key)
    hashes = [_unless_foreign(reply, {}) for reply in pipeline.execute(raise_on_error=False)]
    # A worker that was killed leaves its name in the set until its hash has expired and RQ cleans up.
    return [_read_worker(key, fields) for key, fields in zip(worker_keys, hashes, strict=True) if fields]


def _unless_foreign(reply: Any, otherwise: Any) -> Any:
    """The reply; `otherwise` where a key of another type stands. Raises redis-py's other errors."""
    if isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE"):
        return otherwise
    if isinstance(reply, Exception):
        raise reply
    return reply


def _number(field: str | None) -> int:
    """A worker's hash is whatever stands there."""
    return int(field) if field and field.isdecimal() and len(field) < MAX_DIGITS else 0


def _read_worker(key: bytes, fields: dict[bytes, bytes]) -> WorkerInfo:
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    return WorkerInfo(
        name=key.decode(errors="replace").removeprefix(keys.worker("")),
        state=text.get("state", "?"),
        queues=[name for name in text.get("queues", "").split(",") if name],
        host=text.get("hostname", ""),
        pid=_number(text.get("pid")),
        model=text.get("embedq_model", ""),
        device=text.get("embedq_device", ""),
        jobs_done=_number(text.get("successful_job_count")),
        jobs_failed=_number(text.get("failed_job_count")),
        last_heartbeat=text.get("last_heartbeat", ""),
    )
