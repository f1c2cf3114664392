"""A look at all queues and workers of one Redis, without changing anything.

    with redis.Redis(...) as client:
        seen = fleet.look(client)                      # once
        reader = fleet.FleetReader(client)             # again and again
        for queue in reader.look().queues:
            print(queue.name, queue.texts, queue.backlog_s)

RQ's own `rq info` cleans registries while it reads; this only counts. Knows the commands of a look; what waits is in
`waiting`, rates are in `backlog`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import redis

from embedq.producer import keys
from embedq.producer.backlog import Backlog
from embedq.producer.connection import is_denied, is_wrong_type, translated_errors
from embedq.producer.figures import WorkerFigures, read_figures, seconds_of
from embedq.producer.waiting import Waiting, WaitingReader

#: Digits of a count that can be one.
MAX_DIGITS = 18
#: Seconds without a sign of life after which a worker of ours is lost; those that live renew their leases every 15 s.
LOST_AFTER_S = 90.0
#: The state of a worker that is lost: it was killed, or cannot reach Redis.
LOST = "lost"

#: What is counted of a queue, by the name in `QueueInfo`.
_COUNTS = {
    "queued": ("LLEN", keys.queue),
    "started": ("ZCARD", keys.started),
    "finished": ("ZCARD", keys.finished),
    "failed": ("ZCARD", keys.failed),
    "canceled": ("ZCARD", keys.canceled),
    "scheduled": ("ZCARD", keys.scheduled),
    "deferred": ("ZCARD", keys.deferred),
    "parked": ("ZCARD", keys.parked),
}


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """One queue; the statuses' numbers are jobs. `finished` and `failed` are those that are kept still."""

    name: str
    queued: int
    started: int
    finished: int
    failed: int
    canceled: int
    scheduled: int
    deferred: int
    #: waiting for a newer worker
    parked: int
    #: of the waiting jobs: exact or, with `is_estimate`, from a sample
    texts: int
    #: of the waiting jobs, by what workers learnt of tokens per byte
    tokens: int
    #: of the waiting jobs; 0 if none waits, None if Redis' user may not look at jobs
    oldest_age_s: float | None
    #: until the waiting jobs are encoded; inf if jobs wait and no worker has told its rate yet
    backlog_s: float
    #: what the live workers of the queue are capable of together, and how many they are
    tokens_per_s: float
    num_workers: int
    #: texts are not counted but estimated
    is_estimate: bool


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One live worker, as it last reported itself."""

    name: str
    #: RQ's `started`, `idle`, `busy` or `suspended`; `lost` after LOST_AFTER_S without a sign of life
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
    #: seconds since the last sign of life, by the server's clock; None if it tells no time
    silent_s: float | None
    #: None of a stock RQ worker, and of one that just starts
    figures: WorkerFigures | None

    @property
    def is_lost(self) -> bool:
        return self.state == LOST


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Memory of the Redis server in bytes; 0: no limit."""

    used_memory_bytes: int
    max_memory_bytes: int


@dataclass(frozen=True, slots=True)
class FleetInfo:
    queues: list[QueueInfo]
    workers: list[WorkerInfo]
    #: `rq suspend` is in force
    suspended: bool
    #: None if Redis' user may not ask
    server: ServerInfo | None

    def to_plain(self) -> dict[str, Any]:
        """For JSON, in which an endless `backlog_s` is null."""
        return asdict(self)


def look(client: redis.Redis) -> FleetInfo:
    """One look. Raises QueueConnectionError."""
    return FleetReader(client).look()


class FleetReader:
    """Looks again and again, and remembers the rates of workers that are gone. For one thread."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        self._waiting = WaitingReader(client)
        self._backlog = Backlog()

    def look(self) -> FleetInfo:
        """Three round trips, however many queues and workers there are; one more where the script is not loaded yet.

        Raises QueueConnectionError; QueueAccessError for a user who may not see queues and workers.
        """
        with translated_errors(self._redis):
            queue_keys, worker_keys, suspended, clock = self._ask(
                ("SMEMBERS", keys.QUEUES), ("SMEMBERS", keys.WORKERS), ("EXISTS", keys.SUSPENDED), ("TIME",)
            )
            names = sorted({keys.queue_name(key.decode(errors="replace")) for key in queue_keys or ()})
            hash_keys = sorted(worker_keys or ())
            replies = iter(
                self._ask(
                    *((command, key(name)) for name in names for command, key in _COUNTS.values()),
                    *(("HGETALL", key) for key in hash_keys),
                    ("INFO", "memory"),
                )
            )
            counts = {name: {status: next(replies) or 0 for status in _COUNTS} for name in names}
            hashes = [(key, next(replies)) for key in hash_keys]
            waiting = self._waiting.read({name: of_queue["queued"] for name, of_queue in counts.items()})
        # A worker that was killed leaves its name in the set until its hash has expired and RQ cleans up.
        workers = [_read_worker(key, fields, clock[0] + clock[1] / 1e6) for key, fields in hashes if fields]
        return FleetInfo(self._queues(counts, waiting, workers), workers, bool(suspended), _read_server(next(replies)))

    def _ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """None for a key of another type, and for what may be denied: INFO. Raises redis.RedisError."""
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies = pipeline.execute(raise_on_error=False)
        for place, (command, reply) in enumerate(zip(commands, replies, strict=True)):
            if not isinstance(reply, Exception):
                continue
            if not isinstance(reply, redis.ResponseError):
                raise reply
            if not (is_wrong_type(reply) or (command[0] == "INFO" and is_denied(reply))):
                raise reply
            replies[place] = None
        return list(replies)

    def _queues(
        self,
        counts: Mapping[str, Mapping[str, int]],
        waiting: Mapping[str, Waiting] | None,
        workers: Sequence[WorkerInfo],
    ) -> list[QueueInfo]:
        live = [worker for worker in workers if not worker.is_lost]
        self._backlog.learn([worker.figures for worker in live if worker.figures is not None])
        queues = []
        for name, of_queue in counts.items():
            serving = [worker.figures for worker in live if name in worker.queues]
            seen = None if waiting is None else waiting[name]
            load = self._backlog.load(name, of_queue["queued"], seen, serving)
            queues.append(
                QueueInfo(
                    name=name,
                    **of_queue,
                    texts=load.texts,
                    tokens=load.tokens,
                    oldest_age_s=None if seen is None else seen.oldest_age_s,
                    backlog_s=load.backlog_s,
                    tokens_per_s=load.tokens_per_s,
                    num_workers=len(serving),
                    is_estimate=seen is None or not seen.is_exact,
                )
            )
        return queues


def _number(field: str | None) -> int:
    """A worker's hash is whatever stands there."""
    return int(field) if field and field.isdecimal() and len(field) < MAX_DIGITS else 0


def _read_worker(key: bytes, fields: dict[bytes, bytes], now_s: float) -> WorkerInfo:
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    figures = read_figures(fields.get(b"embedq_figures"))
    heartbeat = text.get("last_heartbeat", "")
    signs = [seconds_of(heartbeat), figures and figures.time]
    silent_s = max(0.0, now_s - max(known)) if (known := [sign for sign in signs if sign]) else None
    is_ours = "embedq_model" in text
    return WorkerInfo(
        name=key.decode(errors="replace").removeprefix(keys.worker("")),
        state=LOST if is_ours and silent_s is not None and silent_s > LOST_AFTER_S else text.get("state", "?"),
        queues=[name for name in text.get("queues", "").split(",") if name],
        host=text.get("hostname", ""),
        pid=_number(text.get("pid")),
        model=text.get("embedq_model", ""),
        device=text.get("embedq_device", ""),
        jobs_done=_number(text.get("successful_job_count")),
        jobs_failed=_number(text.get("failed_job_count")),
        last_heartbeat=heartbeat,
        silent_s=silent_s,
        figures=figures,
    )


def _read_server(memory: Any) -> ServerInfo | None:
    if not isinstance(memory, dict):
        return None
    return ServerInfo(int(memory.get("used_memory", 0)), int(memory.get("maxmemory", 0)))
