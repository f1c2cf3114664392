"""What follows a job's end: dependents onto their queues, its repetition, the slot of a rate limit, callbacks.

RQ does this inside a job's execution; here it comes right after the commit, for the few jobs that the scripts report as
having a sequel. Knows RQ's jobs; callbacks run elsewhere (`callbacks`), webhooks never: they would let whoever enqueues
send requests from inside the worker's network.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis
from rq.defaults import CALLBACK_TIMEOUT
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.job_lifecycle import call_exception_handlers
from rq.queue import Queue
from rq.rate_limit import release_slot

from embedq.producer import keys, scripts, wire
from embedq.producer.connection import is_passing
from embedq.producer.serializer import EmbedSerializer
from embedq.producer.status import JobStatus
from embedq.worker.callbacks import PATIENCE_S, Call, CallbackThread
from embedq.worker.foreign_jobs import ForeignJob

logger = logging.getLogger("embedq.worker")

#: Seconds after a job's end at which its worker must have died if what follows is not done.
ORPHANED_S = 120
#: Jobs that may wait for one; RQ has all of their ids in memory at once. A client asks for far fewer.
MAX_DEPENDENTS = 100_000
#: Seconds between two looks for such jobs, and jobs of one queue that one look takes up.
LOOK_EVERY_S, ORPHANS = 10.0, 20


class Sequels:
    """Does what follows. Raises redis-py's error where Redis cannot serve; then the same call may be made again.

    The scripts that end a job remember those that have a sequel until it is done here, so that another worker takes it
    up if one dies. Each step may so be done twice, but a callback is called once or, where the worker dies, not at all.
    """

    def __init__(
        self,
        client: redis.Redis,
        queues: Sequence[str],
        callbacks: CallbackThread,
        exception_handlers: Sequence[Callable[..., Any]] = (),
    ) -> None:
        self._client = client
        self._queues = list(queues)
        self._next_look = time.monotonic()
        self._callbacks = callbacks
        self._exception_handlers = exception_handlers
        self._repeat = scripts.load(client, __package__, "repeat")
        self._orphans = scripts.load(client, __package__, "orphans")

    def follow(self, queue_name: str, job_id: str, patience_s: float = PATIENCE_S) -> None:
        """For one job that has ended, or whose next attempt is scheduled. What RQ cannot read is logged.

        Where many callbacks wait, it waits for its turn to join them, but only so long.
        """
        job = None
        with errors_logged("what follows a job", job_id):
            job = self._settle(queue_name, job_id)
        # Whoever strikes it off calls back; another worker may have been faster.
        is_ours = self._client.zrem(keys.sequels(queue_name), job_id)
        if job is not None and is_ours:
            self._call_back(job, patience_s)

    def follow_all(self, queue_name: str, job_ids: Sequence[str]) -> None:
        """For a thread that must not wait."""
        for job_id in job_ids:
            self.follow(queue_name, job_id, patience_s=0)

    def take_up(self) -> None:
        """What dead workers left undone, looked for every LOOK_EVERY_S however often this is called."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        found = self._orphans(keys=list(map(keys.sequels, self._queues)), args=[ORPHANED_S, ORPHANS])
        for place, job_id in zip(found[::2], found[1::2], strict=True):
            self.follow_all(self._queues[place - 1], [job_id.decode(errors="replace")])
        for name in self._queues:
            self._enqueue_ready(name)

    def report(self, job_id: str, reason: bytes) -> None:
        """RQ's exception handlers, for each attempt that failed; `reason` as RQ stores it."""
        if self._exception_handlers:
            handlers = functools.partial(call_exception_handlers, self._exception_handlers)
            arguments = functools.partial(self._report_arguments, job_id, reason)
            self._callbacks.submit(Call(handlers, "an exception handler", arguments, CALLBACK_TIMEOUT))

    def _settle(self, queue_name: str, job_id: str) -> Job:
        """Everything but the callback."""
        job = ForeignJob.fetch(job_id, connection=self._client, serializer=EmbedSerializer)
        status = job.get_status(refresh=False)
        if status in (JobStatus.FINISHED.value, JobStatus.FAILED.value):
            with errors_logged("the dependents of a job", job_id):
                self._enqueue_dependents(queue_name, job)
        # One that repeats at once keeps its slot, as RQ has it.
        if not (status == JobStatus.FINISHED.value and job.repeats_left and self._repeats_now(queue_name, job_id)):
            release_slot(job)
        return job

    def _enqueue_dependents(self, queue_name: str, job: Job) -> None:
        if self._client.scard(keys.dependents(job.id)) > MAX_DEPENDENTS:
            logger.warning("a job has more than %d dependents; they stay deferred", MAX_DEPENDENTS)
            logger.debug("job %s has too many dependents", job.id, extra={"job": job.id})
            return
        self._queue(queue_name).enqueue_dependents(job)

    def _enqueue_ready(self, queue_name: str) -> None:
        """RQ puts a dependent into this registry first and onto its queue in a second step. If that came to nothing,
        the same call again finds no dependents.
        """
        registry = self._queue(queue_name).ready_job_registry
        job_ids: list[Any] = []
        with errors_logged(f"the jobs of queue {queue_name} that depend on nothing any more"):
            job_ids = list(self._client.zrange(registry.key, 0, ORPHANS - 1))
        for job_id in job_ids:
            with errors_logged("what a job waited for"):
                registry.enqueue_jobs([job_id.decode(errors="replace")])

    def _queue(self, name: str) -> Queue:
        return Queue(name, connection=self._client, serializer=EmbedSerializer, job_class=ForeignJob)

    def _report_arguments(self, job_id: str, reason: bytes) -> tuple[Any, ...]:
        job = ForeignJob.fetch(job_id, connection=self._client, serializer=EmbedSerializer)
        return job, *_exc_info(wire.decode_exc_string(reason))

    def _call_back(self, job: Job, patience_s: float) -> None:
        name, timeout_s, arguments = _callback(job)
        if name and (function := self._callbacks.allowed(name)):
            what = f"the callback {name}"
            logger.debug("%s is due for job %s", what, job.id, extra={"job": job.id})
            self._callbacks.submit(Call(function, what, functools.partial(arguments, job), timeout_s), patience_s)

    def _repeats_now(self, queue_name: str, job_id: str) -> bool:
        outcome = self._repeat(
            keys=[keys.job(job_id), keys.QUEUES, keys.scheduled(queue_name), keys.finished(queue_name)],
            args=[job_id, keys.queue(queue_name)],
        )
        return bool(outcome == b"queued")


@contextlib.contextmanager
def errors_logged(what: str, job_id: str = "") -> Iterator[None]:
    """For RQ's code over data that anybody may have written: only a Redis that cannot serve is an error of ours."""
    try:
        yield
    except NoSuchJobError:
        return
    except Exception as err:
        if isinstance(err, redis.RedisError) and is_passing(err):
            raise
        # Its text may quote what stands in the job.
        logger.warning("%s could not be done: %s", what, type(err).__name__)
        logger.debug("the error, job %s", job_id or "unknown", exc_info=True, extra={"job": job_id})


def _callback(job: Job) -> tuple[str | None, int, Callable[[Job], tuple[Any, ...]]]:
    """The callback that this job's state calls for: name, time limit in seconds, RQ's arguments for it."""
    match job.get_status(refresh=False):
        case JobStatus.FINISHED.value:
            return job._success_callback_name, job.success_callback_timeout, _success_arguments
        case JobStatus.FAILED.value:
            return job._failure_callback_name, job.failure_callback_timeout, _failure_arguments
        case JobStatus.STOPPED.value:
            return job._stopped_callback_name, job.stopped_callback_timeout, _stopped_arguments
        case _:
            return None, 0, _stopped_arguments


def _success_arguments(job: Job) -> tuple[Any, ...]:
    return job, job.connection, job.return_value()


def _failure_arguments(job: Job) -> tuple[Any, ...]:
    entries: Any = job.connection.xrevrange(keys.results(job.id), count=1)
    exc_string = entries[0][1].get(b"exc_string", b"") if entries else b""
    return job, job.connection, *_exc_info(wire.decode_exc_string(exc_string))


def _stopped_arguments(job: Job) -> tuple[Any, ...]:
    return job, job.connection


def _exc_info(failure: Exception) -> tuple[type[Exception], Exception, None]:
    """An error as RQ has it in hand, but for the traceback: what is known of it stands in Redis."""
    return type(failure), failure, None
