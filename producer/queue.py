"""The client: put texts on a queue, follow the jobs, fetch the embeddings.

Knows the public surface and does the round trips; what is asked of Redis is in `calls`, what goes onto the queue in
`requests`, waiting in `results`. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import redis

from embedq.producer import calls, embedding, requests
from embedq.producer.client import DEFAULT_QUEUE, QueueClient
from embedq.producer.connection import connect, translated_errors
from embedq.producer.driver import WatchedJobs, drive
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import EmbedqError, InvalidTextError
from embedq.producer.groups import JobGroup
from embedq.producer.jobs import EmbedJob
from embedq.producer.options import check_job_id
from embedq.producer.outcomes import Outcome
from embedq.producer.results import ResultReader
from embedq.producer.settings import EnqueueKeywords, job_ids_of
from embedq.producer.status import JobStatus
from embedq.producer.streaming import (
    SILENCE_S,
    WINDOW_TEXTS,
    OnError,
    StreamStep,
    TextEmbedding,
    open_stream,
)

Result = TypeVar("Result")


class EmbedQueue(QueueClient[redis.Redis]):
    """One queue of one Redis. Threads may share it; processes make their own.

    q = EmbedQueue("redis://localhost:6379/0", queue="embed")
    q.enqueue("a text").result(timeout=30).vectors     # (1, d) float32

    `max_depth` and `block_timeout` hold for every call that doesn't say otherwise: beyond so many jobs on the queue
    enqueueing raises QueueFull, after having waited so many seconds for room.

    A URL is `redis://`, `rediss://` (TLS; `?ssl_ca_certs=PATH`, `&ssl_certfile=PATH&ssl_keyfile=PATH`), `unix://`, or
    `redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB`, which follows the master that Sentinel names.

    Raises ConfigurationError at once for a URL that cannot be read, InvalidOptionError for a limit that is none; every
    call may raise QueueConnectionError.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queue: str = DEFAULT_QUEUE,
        connection: redis.Redis | None = None,
        max_depth: int | None = None,
        block_timeout: float = 0,
    ) -> None:
        defaults: EnqueueKeywords = {"max_depth": max_depth, "block_timeout": block_timeout}
        super().__init__(url, queue, connection, connect, defaults)

    # --- putting texts on the queue

    def enqueue(
        self, texts: str | Sequence[str], *, job_id: str | None = None, **keywords: Unpack[EnqueueKeywords]
    ) -> EmbedJob:
        """One job with one text or up to 1,024; one round trip.

        Keywords are those of `EmbedOptions` (dimensions, precision, prompt, chunk, output, ...) and of `JobSettings`
        (result_ttl, failure_ttl, ttl, retries, retry_intervals, at_front, description, dedupe, group, depends_on,
        on_success, on_failure, max_depth, block_timeout). Enqueueing the same request under the same `job_id` again
        returns the same job, and so does `dedupe` without an id; there a job that failed or was canceled starts
        afresh.

        Raises InvalidTextError, InvalidOptionError, InvalidJobIdError; DuplicateJobError if the id is taken by
        another request, QueueFull beyond `max_depth`, JobNotFoundError if a job to depend on is not there. Then
        nothing was enqueued.
        """
        return self._enqueue(texts, job_id, keywords)

    def enqueue_at(
        self,
        moment: datetime,
        texts: str | Sequence[str],
        *,
        job_id: str | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> EmbedJob:
        """As `enqueue`, but the job waits until then, to the second: `scheduled`, as by RQ's own `enqueue_at`.

        Raises InvalidOptionError for a datetime without a time zone. Its `ttl` runs from that moment on.
        """
        return self._enqueue(texts, job_id, keywords, calls.start_at(moment))

    def enqueue_in(
        self,
        delay: float | timedelta,
        texts: str | Sequence[str],
        *,
        job_id: str | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> EmbedJob:
        """As `enqueue_at`, so many seconds from now by the clock of the Redis server."""
        return self._enqueue(texts, job_id, keywords, calls.start_in(delay))

    def enqueue_many(
        self,
        texts: Iterable[str],
        *,
        job_ids: Iterable[str] | None = None,
        delay: float | timedelta = 0,
        **keywords: Unpack[EnqueueKeywords],
    ) -> list[EmbedJob]:
        """One job a text, in order; a round trip per thousand. All texts are checked before the first is sent.

        Raises as `enqueue` does, and PartialEnqueueError, which lists the jobs that got through, if a chunk after
        the first fails. `job_ids` must be as many as the texts; `delay` as in `enqueue_in`.
        """
        options, settings = self._split(keywords)
        made = requests.one_a_text(self.name, texts, job_ids, options, settings)
        may_rename = job_ids is None and not settings.dedupe
        made, _ = self._run(self._place.enqueue(made, settings, calls.start_in(delay), may_rename=may_rename))
        return [EmbedJob(request.job_id, self) for request in made]

    def embed(
        self,
        texts: str | Iterable[str],
        *,
        timeout: float | None = 60,
        cache_ttl: int | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> Embeddings:
        """Enqueues any number of texts and waits: (n, d) in their order. [] raises InvalidTextError.

        With `cache_ttl` each text's vectors are kept so many seconds by the hash of text, options and `model`, which
        must be named, and only what is not there is enqueued.

        Raises the first failure as `result` does, its `text_index` that of `texts`. Whatever is still waiting when it
        raises is canceled, except under `dedupe`, where others may wait for it too.
        """
        options, settings = self._split({"result_ttl": embedding.EMBED_RESULT_TTL_S, **keywords})
        return self._run(embedding.embed(self._place, texts, options, settings, timeout, cache_ttl))

    def embed_stream(
        self,
        texts: Iterable[str],
        *,
        window: int = WINDOW_TEXTS,
        ordered: bool = True,
        texts_per_job: int | None = None,
        timeout: float | None = SILENCE_S,
        on_error: OnError = "raise",
        cache_ttl: int | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> Iterator[TextEmbedding]:
        """Embeds any number of texts, `window` of them under way at most; one result a text, in order unless `ordered`
        is false. Texts are taken a quarter of the window at a time: for a source that trickles, choose a small one.

        A text that fails ends the stream with its error where its job begins, or with `on_error="yield"` comes out as
        an item with `error`; texts that shared its job are then enqueued again without it. `timeout`: seconds without
        any result, after which ResultTimeoutError is raised. `cache_ttl` as in `embed`. Leaving the stream early
        cancels what still waits, except under `dedupe`. Results are deleted once they are read, unless `result_ttl`,
        `dedupe`, `group` or a callback says that somebody else may want them.
        """
        if isinstance(texts, str):
            raise InvalidTextError("embed_stream takes any number of texts; embed takes one")
        stream = open_stream(
            self._place,
            keywords,
            defaults=self._defaults,
            window=window,
            ordered=ordered,
            texts_per_job=texts_per_job,
            on_error=on_error,
            cache_ttl=cache_ttl,
        )
        return self._drive(stream.run(timeout), iter(texts))

    # --- following jobs

    def job(self, job_id: str) -> EmbedJob:
        """The handle of a job by its id. Raises JobNotFoundError."""
        self.status(job_id)
        return EmbedJob(job_id, self)

    def status(self, job_id: str) -> JobStatus:
        """Raises JobNotFoundError if the job never existed or has expired."""
        return self._run(self._place.status(job_id))

    def statuses(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """One round trip for ten thousand; None for a job that is not there."""
        return self._run(self._place.statuses(job_ids))

    def result(self, job_id: str, timeout: float | None = 30) -> Embeddings:
        """The embeddings of one job, waited for up to `timeout` seconds (0: only look, None: for good).

        Raises JobFailedError, JobCanceledError, JobNotFoundError (expired, too), ResultTimeoutError, WireError.
        """
        [(_, outcome)] = self._outcomes([check_job_id(job_id)], timeout)
        if isinstance(outcome, EmbedqError):
            raise outcome
        return outcome

    def results(self, job_ids: Iterable[str], timeout: float | None = 30) -> dict[str, Outcome]:
        """Each job's embeddings, or the error that `result` would raise for it."""
        ids = list(job_ids_of(job_ids))
        found = dict(self._outcomes(ids, timeout))
        return {job_id: found[job_id] for job_id in ids}

    def as_completed(
        self, jobs: Iterable[str | EmbedJob], timeout: float | None = 30
    ) -> Iterator[tuple[EmbedJob, Outcome]]:
        """Each job once, as it ends, with its embeddings or the error that `result` would raise for it.

        What has not ended after `timeout` seconds comes last, with ResultTimeoutError.
        """
        ids = job_ids_of(jobs)
        return ((EmbedJob(job_id, self), outcome) for job_id, outcome in self._outcomes(list(ids), timeout))

    def group(self, name: str) -> JobGroup:
        """The jobs enqueued with `group=name`. Raises InvalidOptionError for what is no name."""
        return JobGroup(name, self)

    # --- changing jobs

    def cancel(self, job_id: str) -> bool:
        """True if this call canceled the job, False if it had ended before. Raises JobNotFoundError.

        A job that a worker has in hand counts as canceled; what the worker makes of it is dropped.
        """
        return self._run(self._place.cancel(job_id))

    def requeue(self, job_id: str, *, at_front: bool = False) -> None:
        """Back onto its queue, with as many retries as it was enqueued with.

        Raises JobNotFoundError, and JobStateError unless the job failed or was canceled.
        """
        self._run(self._place.requeue(job_id, at_front=at_front))

    def depth(self) -> int:
        """Jobs waiting on this queue."""
        return self._run(self._place.depth())

    def close(self) -> None:
        """Closes the connections, unless they were the caller's."""
        if self._owns_connection:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- the steps

    def _enqueue(
        self,
        texts: str | Sequence[str],
        job_id: str | None,
        keywords: EnqueueKeywords,
        start: calls.Start = calls.NOW,
    ) -> EmbedJob:
        request, settings = self._request(texts, job_id, keywords)
        may_rename = job_id is None and not settings.dedupe
        jobs, _ = self._run(self._place.enqueue([request], settings, start, may_rename=may_rename))
        return EmbedJob(jobs[0].job_id, self)

    def _run(self, operation: calls.Operation[Result]) -> Result:
        """Does an operation that hands nothing out."""
        try:
            next(self._drive(operation, iter(())))
        except StopIteration as end:
            result: Result = end.value
            return result
        raise AssertionError("only a stream hands out")

    def _drive(
        self, operation: Generator[StreamStep, Any, Result], source: Iterator[str]
    ) -> Generator[TextEmbedding, None, Result]:
        return drive(operation, source, lambda step: self._do(step), WatchedJobs(ResultReader(self._client)))

    def _do(self, step: calls.RedisStep | calls.Pause | calls.Fork) -> Any:
        if isinstance(step, calls.Pause):
            return time.sleep(step.seconds)
        if isinstance(step, calls.Fork):
            raise AssertionError("only several servers are asked at once")
        with translated_errors(self._client):
            if isinstance(step, calls.ScriptCall):
                return self._scripts[step.script](keys=step.keys, args=step.args)
            pipeline = self._redis.pipeline(transaction=False)
            for command in step.commands:
                pipeline.execute_command(*command)
            return pipeline.execute()

    def _outcomes(self, job_ids: list[str], timeout: float | None) -> Iterator[tuple[str, Outcome]]:
        return ResultReader(self._client).outcomes(job_ids, timeout)
