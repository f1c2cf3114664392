"""What stands in Redis for one queue, read or as the model has it: equal where the scripts do what the model does.

Knows RQ's keys; changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from embedq.producer import keys
from tests.queue.protocol_model import State

QUEUE = "embed"
#: By the model's number.
JOB_IDS = ("job-a", "job-b", "job-c", "job-d")
_FIELDS = ("status", "retries_left", "embedq_attempts")


@dataclass(frozen=True, slots=True)
class JobView:
    status: str
    retries_left: int
    attempts: int
    #: types of the result stream's entries
    stream: tuple[int, ...]
    #: execution ids in the job's sorted set
    executions: frozenset[str]
    #: whether the hash is there for a limited time alone
    expires: bool


@dataclass(frozen=True, slots=True)
class View:
    jobs: dict[str, JobView]
    queue: list[str]
    #: by `job:execution` of the started registry, the worker in the execution's hash, and whether it is noted as begun
    executions: dict[str, tuple[str, bool]]
    #: of the started registry, those whose lease has run out, in the order in which they are recovered
    ran_out: list[str]
    #: by worker, the pairs in its set
    held: dict[str, set[str]]
    registries: dict[str, set[str]]
    keys: set[str]


def of_model(state: State, stopped: frozenset[int]) -> View:
    """stopped: the jobs after whose end something is still to be done."""
    jobs = {number: job for number, job in enumerate(state.jobs) if job is not None}
    pairs = {execution: f"{JOB_IDS[execution.job]}:{execution.name}" for execution in state.executions}
    held: dict[str, set[str]] = {}
    for execution, pair in pairs.items():
        held.setdefault(str(execution.worker), set()).add(pair)
    return View(
        jobs={
            JOB_IDS[number]: JobView(
                job.status,
                job.retries_left,
                job.attempts,
                job.stream,
                frozenset(str(execution.name) for execution in state.executions if execution.job == number),
                job.is_terminal,
            )
            for number, job in jobs.items()
        },
        queue=[JOB_IDS[number] for number in state.queue],
        executions={pair: (str(execution.worker), execution.has_begun) for execution, pair in pairs.items()},
        ran_out=[pairs[found] for found in sorted(pairs, key=lambda found: found.ran_out) if found.ran_out],
        held=held,
        registries={name: {JOB_IDS[number] for number in members} for name, members in _registries(state).items()},
        keys=_model_keys(state, pairs.values(), held, stopped),
    )


def _registries(state: State) -> dict[str, frozenset[int]]:
    return {
        keys.scheduled(QUEUE): state.scheduled,
        keys.finished(QUEUE): state.finished,
        keys.failed(QUEUE): state.failed,
        keys.canceled(QUEUE): state.canceled,
    }


def _model_keys(state: State, pairs: Any, held: dict[str, set[str]], stopped: frozenset[int]) -> set[str]:
    found = {name for name, members in _registries(state).items() if members}
    found |= {keys.execution(*pair.split(":")) for pair in pairs}
    found |= {keys.executions(JOB_IDS[execution.job]) for execution in state.executions}
    found |= {keys.worker_executions(worker) for worker in held}
    found |= {keys.worker_claim(str(worker)) for worker, _ in state.nonces}
    for number, job in enumerate(state.jobs):
        if job is not None:
            found |= {keys.QUEUES, keys.job(JOB_IDS[number])}
            found |= {keys.results(JOB_IDS[number])} if job.stream else set()
    found |= {keys.queue(QUEUE)} if state.queue else set()
    found |= {keys.started(QUEUE)} if state.executions else set()
    found |= {keys.sequels(QUEUE)} if stopped else set()
    return found


def read(client: redis.Redis) -> View:
    redis_client: Any = client
    all_keys = sorted(key.decode() for key in redis_client.keys("*"))
    ids = [job_id for job_id in JOB_IDS if keys.job(job_id) in all_keys]
    names = [name for name in all_keys if name.startswith(keys.worker("")) and name.endswith(":executions")]
    pairs = [pair.decode() for pair in redis_client.zrange(keys.started(QUEUE), 0, -1)]
    registries = list(_registries(State(())))
    pipeline = redis_client.pipeline(transaction=False)
    for job_id in ids:
        pipeline.hmget(keys.job(job_id), *_FIELDS).ttl(keys.job(job_id))
        pipeline.xrange(keys.results(job_id)).zrange(keys.executions(job_id), 0, -1)
    for pair in pairs:
        pipeline.hmget(keys.execution(*pair.split(":")), "worker_name", "begun")
    for name in names:
        pipeline.smembers(name)
    for registry in registries:
        pipeline.zrange(registry, 0, -1)
    pipeline.lrange(keys.queue(QUEUE), 0, -1).zrange(keys.started(QUEUE), "-inf", 1e9, byscore=True)
    replies = iter(pipeline.execute())
    return View(
        jobs={job_id: _job_view(*(next(replies) for _ in range(4))) for job_id in ids},
        executions={pair: _execution_view(next(replies)) for pair in pairs},
        held={name.removeprefix(keys.worker("")).removesuffix(":executions"): _texts(next(replies)) for name in names},
        registries={registry: _texts(next(replies)) for registry in registries},
        queue=[entry.decode() for entry in next(replies)],
        ran_out=[pair.decode() for pair in next(replies)],
        keys=set(all_keys),
    )


def _job_view(fields: Sequence[bytes | None], ttl: int, entries: Any, executions: Sequence[bytes]) -> JobView:
    status, retries_left, attempts = (field.decode() if field is not None else "" for field in fields)
    types = tuple(int(entry[b"type"]) for _, entry in entries)
    ids = frozenset(name.decode() for name in executions)
    return JobView(status, int(retries_left), int(attempts or 0), types, ids, expires=ttl > 0)


def _execution_view(fields: Sequence[bytes | None]) -> tuple[str, bool]:
    worker, begun = fields
    return (worker or b"").decode(), begun is not None


def _texts(entries: Any) -> set[str]:
    return {entry.decode() for entry in entries}
