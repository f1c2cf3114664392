"""The client: put texts on a queue, follow the jobs, fetch the embeddings.

Knows the public surface and in which order Redis is asked; key names are in `keys`, bytes in `wire`, waiting in
`results`. Needs no torch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple, Self, Unpack
from uuid import uuid4

import redis

from embedq.producer import keys, scripts, wire
from embedq.producer.connection import DEFAULT_URL, check_client, connect, translated_errors
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import (
    ConfigurationError,
    DuplicateJobError,
    EmbedqError,
    InvalidJobIdError,
    InvalidTextError,
    JobStateError,
    PartialEnqueueError,
    QueueConnectionError,
    ResultTimeoutError,
)
from embedq.producer.jobs import EmbedJob
from embedq.producer.options import (
    FAILURE_TTL_S,
    MAX_JOB_CHARS,
    EmbedOptions,
    EnqueueKeywords,
    JobSettings,
    check_job_id,
    check_text,
    check_texts,
    lone_surrogate,
    shown,
    split_keywords,
)
from embedq.producer.results import Outcome, ResultReader, not_found, read_status
from embedq.producer.status import JobStatus

DEFAULT_QUEUE = "embed"
#: Bounds of one call of enqueue.lua: it holds the server up for some 10 ms.
CHUNK_JOBS = 1000
CHUNK_BYTES = 4_000_000
#: `embed` spreads its texts over jobs of so many, so that several workers share them.
TEXTS_PER_EMBED_JOB = 64
#: The same where each token has a vector: a job's results stay below what a worker refuses (64 MiB).
TEXTS_PER_TOKEN_JOB = 16
#: Seconds that `embed` leaves its results in Redis, whose ids nobody else knows.
EMBED_RESULT_TTL_S = 300
#: RQ's time limit of a job, which only a stock `rq worker` applies: 1,024 long texts on one CPU.
JOB_TIMEOUT_S = 3600


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
        self._enqueue_script = scripts.load(self._client, __package__, "enqueue")
        prelude = scripts.source(__package__, "common")
        self._cancel_script = scripts.load(self._client, __package__, "cancel", prelude)
        self._requeue_script = scripts.load(self._client, __package__, "requeue", prelude)

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
        checked = check_texts(texts)
        job = EmbedJob(uuid4().hex if job_id is None else check_job_id(job_id), self)
        self._push([_request(job.id, checked, options, settings)], settings)
        return job

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
        if isinstance(texts, str):
            raise InvalidTextError("enqueue_many takes a list of texts; enqueue takes one")
        requests: list[_Request] = []
        for index, (text, job_id) in enumerate(_paired(texts, job_ids)):
            check_text(text, index)
            requests.append(_request(job_id, [text], options, settings))
        _check_distinct([request.job_id for request in requests])
        jobs = [EmbedJob(request.job_id, self) for request in requests]
        sent = 0
        for chunk in _chunks(requests):
            try:
                self._push(chunk, settings)
            except EmbedqError as err:
                if not sent:
                    raise
                message = f"{sent:,} of {len(jobs):,} jobs are enqueued; then: {err}"
                ids = [job.id for job in jobs[:sent]]
                raise PartialEnqueueError(message, ids, retryable=err.retryable) from err
            sent += len(chunk)
        return jobs

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
        deadline = None if timeout is None else time.monotonic() + timeout
        per_job = TEXTS_PER_TOKEN_JOB if keywords.get("output") == "tokens" else TEXTS_PER_EMBED_JOB
        jobs: list[EmbedJob] = []
        try:
            jobs.extend(self.enqueue(some, **keywords) for some in _slices(everything, per_job))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            parts: dict[str, Embeddings] = {}
            for job_id, outcome in self._outcomes([job.id for job in jobs], left):
                if isinstance(outcome, ResultTimeoutError):
                    raise ResultTimeoutError(
                        f"{len(everything):,} texts took more than {timeout:g} s; what still waited is canceled"
                    )
                if isinstance(outcome, EmbedqError):
                    raise outcome
                parts[job_id] = outcome
        except BaseException:
            self._give_up(jobs)
            raise
        return Embeddings.concatenate([parts[job.id] for job in jobs])

    # --- following jobs

    def job(self, job_id: str) -> EmbedJob:
        """The handle of a job by its id. Raises JobNotFoundError."""
        self.status(job_id)
        return EmbedJob(job_id, self)

    def status(self, job_id: str) -> JobStatus:
        """Raises JobNotFoundError if the job never existed or has expired."""
        status = self.statuses([job_id])[job_id]
        if status is None:
            raise not_found(job_id)
        return status

    def statuses(self, job_ids: Iterable[str]) -> dict[str, JobStatus | None]:
        """One round trip; None for a job that is not there."""
        ids = [check_job_id(job_id) for job_id in job_ids]
        with translated_errors(self._client):
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hget(keys.job(job_id), "status")
            fields = pipeline.execute()
        return {job_id: read_status(field) for job_id, field in zip(ids, fields, strict=True)}

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
        now = datetime.now(UTC)
        found = self._run(
            self._cancel_script,
            [keys.job(check_job_id(job_id)), keys.results(job_id), keys.executions(job_id)],
            [keys.PREFIX, job_id, format_time(now), now.timestamp(), FAILURE_TTL_S],
        )
        return not _found_status(job_id, found).is_terminal

    def requeue(self, job_id: str, *, at_front: bool = False) -> None:
        """Back onto its queue, with as many retries as it was enqueued with.

        Raises JobNotFoundError, and JobStateError unless the job failed or was canceled.
        """
        found = self._run(
            self._requeue_script,
            [keys.job(check_job_id(job_id)), keys.QUEUES],
            [keys.PREFIX, job_id, format_time(datetime.now(UTC)), _push_command(at_front)],
        )
        status = _found_status(job_id, found)
        if not status.is_terminal or status is JobStatus.FINISHED:
            raise JobStateError(f"job {job_id} is {status}; only a failed or canceled job can be requeued")

    def depth(self) -> int:
        """Jobs waiting on this queue."""
        with translated_errors(self._client):
            return int(self._redis.llen(keys.queue(self.name)))

    def close(self) -> None:
        """Closes the connections, unless they were the caller's."""
        if self._owns_connection:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- the calls to Redis

    def _push(self, requests: Sequence[_Request], settings: JobSettings) -> None:
        """One call of enqueue.lua: all of these jobs or none."""
        shared = self._shared_fields(settings)
        jobs = list(itertools.chain.from_iterable(requests))
        taken = self._run(
            self._enqueue_script,
            [keys.queue(self.name), keys.QUEUES],
            [keys.JOB_PREFIX, _push_command(settings.at_front), settings.ttl or 0, len(shared), *shared, *jobs],
        )
        if taken:
            ids = [job_id.decode() for job_id in taken]
            raise DuplicateJobError(f"job id {ids[0]} is taken by another request", ids)

    def _shared_fields(self, settings: JobSettings) -> list[Any]:
        """The fields of RQ's job hash that all jobs of one call share: name, value, ..."""
        now = format_time(datetime.now(UTC))
        fields: dict[str, Any] = {
            "status": JobStatus.QUEUED.value,
            "origin": self.name,
            "created_at": now,
            "enqueued_at": now,
            "timeout": JOB_TIMEOUT_S,
            "result_ttl": settings.result_ttl,
            "failure_ttl": settings.failure_ttl,
            "retries_left": settings.retries,
            "embedq_retries": settings.retries,
        }
        if settings.ttl is not None:
            fields["ttl"] = settings.ttl
        return list(itertools.chain.from_iterable(fields.items()))

    def _run(self, script: Any, script_keys: list[str], args: list[Any]) -> Any:
        with translated_errors(self._client):
            return script(keys=script_keys, args=args)

    def _outcomes(self, job_ids: list[str], timeout: float | None) -> Iterator[tuple[str, Outcome]]:
        return ResultReader(self._client).outcomes(job_ids, timeout)

    def _give_up(self, jobs: list[EmbedJob]) -> None:
        """The error under way matters more than one from here; what cannot be canceled expires by itself."""
        for job in jobs:
            try:
                job.cancel()
            except QueueConnectionError:
                return
            except EmbedqError:
                continue


class _Request(NamedTuple):
    """What enqueue.lua takes of one job, in its order."""

    job_id: str
    data: bytes
    description: str
    num_texts: int


def _request(job_id: str, texts: Sequence[str], options: EmbedOptions, settings: JobSettings) -> _Request:
    data = wire.encode_request(texts, options)
    return _Request(job_id, data, settings.description or _describe(texts), len(texts))


def format_time(moment: datetime) -> str:
    """As RQ writes a time into its hashes: UTC with microseconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def check_queue_name(name: object) -> str:
    """Raises ConfigurationError."""
    if not isinstance(name, str) or not name or lone_surrogate(name) is not None:
        raise ConfigurationError(f"the queue's name must be a string that is not empty, not {shown(name)}")
    return name


def _push_command(at_front: bool) -> str:
    return "LPUSH" if at_front else "RPUSH"


def _describe(texts: Sequence[str]) -> str:
    """What RQ's tools show of a job: how much it is, never what it says."""
    noun = "text" if len(texts) == 1 else "texts"
    return f"embed {len(texts)} {noun}, {sum(map(len, texts))} characters"


def _paired(texts: Iterable[str], job_ids: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    if job_ids is None:
        yield from ((text, uuid4().hex) for text in texts)
        return
    try:
        yield from ((text, check_job_id(job_id)) for text, job_id in zip(texts, job_ids, strict=True))
    except ValueError as err:
        if isinstance(err, EmbedqError):
            raise
        raise InvalidJobIdError("there must be as many job_ids as texts") from err


def _check_distinct(job_ids: list[str]) -> None:
    if len(set(job_ids)) != len(job_ids):
        seen: set[str] = set()
        twice = next(job_id for job_id in job_ids if job_id in seen or seen.add(job_id))  # type: ignore[func-returns-value]
        raise InvalidJobIdError(f"job id {twice} stands twice in job_ids")


def _slices(texts: list[str], per_job: int) -> Iterator[list[str]]:
    """Consecutive slices for one job each, within `per_job` and MAX_JOB_CHARS; one empty for none."""
    part: list[str] = []
    chars = 0
    for text in texts:
        if part and (len(part) == per_job or chars + len(text) > MAX_JOB_CHARS):
            yield part
            part, chars = [], 0
        part.append(text)
        chars += len(text)
    yield part


def _chunks(requests: list[_Request]) -> Iterator[list[_Request]]:
    """Consecutive slices within CHUNK_JOBS and CHUNK_BYTES."""
    chunk: list[_Request] = []
    size = 0
    for request in requests:
        if chunk and (len(chunk) == CHUNK_JOBS or size + len(request.data) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(request)
        size += len(request.data)
    if chunk:
        yield chunk


def _found_status(job_id: str, found: bytes | None) -> JobStatus:
    status = read_status(found)
    if status is None:
        raise not_found(job_id)
    return status
