"""The client: put texts on a queue, follow the jobs, fetch the embeddings.

Knows the public surface and does the round trips; what is asked of Redis is in `calls`, what goes onto the queue in
`requests`, waiting in `results`. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import redis

from embedq.producer import calls, requests, scripts
from embedq.producer.checks import lone_surrogate, shown
from embedq.producer.connection import DEFAULT_URL, check_client, connect, translated_errors
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import ConfigurationError, EmbedqError, QueueConnectionError, ResultTimeoutError
from embedq.producer.jobs import EmbedJob
from embedq.producer.options import check_job_id, check_text
from embedq.producer.outcomes import Outcome
from embedq.producer.results import ResultReader
from embedq.producer.settings import EnqueueKeywords, split_keywords
from embedq.producer.status import JobStatus

Result = TypeVar("Result")

DEFAULT_QUEUE = "embed"
#: `embed` spreads its texts over jobs of so many, so that several workers share them.
TEXTS_PER_EMBED_JOB = 64
#: The same where each token has a vector: a job's results stay below what a worker refuses (64 MiB).
TEXTS_PER_TOKEN_JOB = 16
#: Seconds that `embed` leaves its results in Redis, whose ids nobody else knows.
EMBED_RESULT_TTL_S = 300


class EmbedQueue:
    """One queue of one Redis. Threads may share it; processes make their own.

    q = EmbedQueue("redis://localhost:6379/0", queue="embed")
    q.enqueue("a text").result(timeout=30).vectors     # (1, d) float32

    Raises ConfigurationError at once for a URL that cannot be read; every call may raise QueueConnectionError.
    """

    def __init__(
        self, url: str | None = None, *, queue: str = DEFAULT_QUEUE, connection: redis.Redis | None = None
    ) -> None:
        if url is not None and connection is not None:
            raise ConfigurationError("give a url or a connection, not both")
        self.name = check_queue_name(queue)
        self._owns_connection = connection is None
        self._client = connect(url or DEFAULT_URL) if connection is None else check_client(connection)
        self._redis: Any = self._client
        prelude = scripts.source(__package__, "common")
        self._scripts = {name: scripts.load(self._client, __package__, name, prelude) for name in calls.SCRIPTS}

    # --- putting texts on the queue

    def enqueue(
        self, texts: str | Sequence[str], *, job_id: str | None = None, **keywords: Unpack[EnqueueKeywords]
    ) -> EmbedJob:
        """One job with one text or up to 1,024; one round trip.

        Keywords are those of `EmbedOptions` (dimensions, precision, prompt, chunk, output, ...) and of `JobSettings`
        (result_ttl, failure_ttl, ttl, retries, at_front, description). Enqueueing the same request under the
        same `job_id` again returns the same job. Raises InvalidTextError, InvalidOptionError, InvalidJobIdError,
        and DuplicateJobError if the id is taken by another request; then nothing was enqueued.
        """
        options, settings = split_keywords(keywords)
        request = requests.one(texts, job_id, options, settings)
        self._run(calls.enqueue(self.name, [request], settings))
        return EmbedJob(request.job_id, self)

    def enqueue_many(
        self,
        texts: Iterable[str],
        *,
        job_ids: Iterable[str] | None = None,
        **keywords: Unpack[EnqueueKeywords],
    ) -> list[EmbedJob]:
        """One job a text, in order; a round trip per thousand. All texts are checked before the first is sent.

        Raises as `enqueue` does, and PartialEnqueueError, which lists the jobs that got through, if a chunk after
        the first fails. `job_ids` must be as many as the texts.
        """
        options, settings = split_keywords(keywords)
        made = requests.one_a_text(texts, job_ids, options, settings)
        self._run(calls.enqueue_in_chunks(self.name, made, settings))
        return [EmbedJob(request.job_id, self) for request in made]

    def embed(
        self, texts: str | Iterable[str], *, timeout: float | None = 60, **keywords: Unpack[EnqueueKeywords]
    ) -> Embeddings:
        """Enqueues any number of texts and waits: (n, d) in their order. [] raises InvalidTextError.

        Raises the first failure as `result` does. Whatever is still waiting when it raises is canceled.
        """
        everything = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(everything):
            check_text(text, index)
        keywords.setdefault("result_ttl", EMBED_RESULT_TTL_S)
        options, settings = split_keywords(keywords)
        per_job = TEXTS_PER_TOKEN_JOB if options.output == "tokens" else TEXTS_PER_EMBED_JOB
        made = requests.spread(everything, per_job, options, settings)
        job_ids = [request.job_id for request in made]
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._run(calls.enqueue_in_chunks(self.name, made, settings))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            parts: dict[str, Embeddings] = {}
            for job_id, outcome in self._outcomes(job_ids, left):
                if isinstance(outcome, ResultTimeoutError):
                    raise ResultTimeoutError(
                        f"{len(everything):,} texts took more than {timeout:g} s; what still waited is canceled"
                    )
                if isinstance(outcome, EmbedqError):
                    raise outcome
                parts[job_id] = outcome
        except BaseException:
            self._give_up(job_ids)
            raise
        return Embeddings.concatenate([parts[job_id] for job_id in job_ids])

    # --- following jobs

    def job(self, job_id: str) -> EmbedJob:
        """The handle of a job by its id. Raises JobNotFoundError."""
        self.status(job_id)
        return EmbedJob(job_id, self)

    def status(self, job_id: str) -> JobStatus:
        """Raises JobNotFoundError if the job never existed or has expired."""
        return self._run(calls.status(job_id))

    def statuses(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """One round trip; None for a job that is not there."""
        return self._run(calls.statuses(job_ids))

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
        ids = [check_job_id(job_id) for job_id in job_ids]
        found = dict(self._outcomes(ids, timeout))
        return {job_id: found[job_id] for job_id in ids}

    # --- changing jobs

    def cancel(self, job_id: str) -> bool:
        """True if this call canceled the job, False if it had ended before. Raises JobNotFoundError.

        A job that a worker has in hand counts as canceled; what the worker makes of it is dropped.
        """
        return self._run(calls.cancel(job_id))

    def requeue(self, job_id: str, *, at_front: bool = False) -> None:
        """Back onto its queue, with as many retries as it was enqueued with.

        Raises JobNotFoundError, and JobStateError unless the job failed or was canceled.
        """
        self._run(calls.requeue(job_id, at_front=at_front))

    def depth(self) -> int:
        """Jobs waiting on this queue."""
        return self._run(calls.depth(self.name))

    def close(self) -> None:
        """Closes the connections, unless they were the caller's."""
        if self._owns_connection:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- the steps

    def _run(self, operation: calls.Operation[Result]) -> Result:
        """Does an operation's steps, one after the other."""
        try:
            step = next(operation)
            while True:
                try:
                    reply = self._do(step)
                except EmbedqError as err:
                    step = operation.throw(err)
                else:
                    step = operation.send(reply)
        except StopIteration as end:
            result: Result = end.value
            return result

    def _do(self, step: calls.Step) -> Any:
        with translated_errors(self._client):
            if isinstance(step, calls.ScriptCall):
                return self._scripts[step.script](keys=step.keys, args=step.args)
            pipeline = self._redis.pipeline(transaction=step.is_transaction)
            for command in step.commands:
                pipeline.execute_command(*command)
            return pipeline.execute()

    def _outcomes(self, job_ids: list[str], timeout: float | None) -> Iterator[tuple[str, Outcome]]:
        return ResultReader(self._client).outcomes(job_ids, timeout)

    def _give_up(self, job_ids: list[str]) -> None:
        """The error under way matters more than one from here; what cannot be canceled expires by itself."""
        for job_id in job_ids:
            try:
                self.cancel(job_id)
            except QueueConnectionError:
                return
            except EmbedqError:
                continue


def format_time(moment: datetime) -> str:
    """As RQ writes a time into its hashes: UTC with microseconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def check_queue_name(name: object) -> str:
    """Raises ConfigurationError."""
    if not isinstance(name, str) or not name or lone_surrogate(name) is not None:
        raise ConfigurationError(f"the queue's name must be a string that is not empty, not {shown(name)}")
    return name
