"""From texts to what enqueue.lua takes: checked, encoded, cut into jobs and calls. Pure; knows no Redis."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

from embedq.producer import wire
from embedq.producer.errors import EmbedqError, InvalidJobIdError, InvalidTextError, JobFailedError
from embedq.producer.options import (
    MAX_JOB_CHARS,
    EmbedOptions,
    check_job_id,
    check_text,
    check_texts,
)
from embedq.producer.settings import JobSettings

#: Bounds of one call of enqueue.lua: it holds the server up for some 10 ms.
CHUNK_JOBS = 1000
CHUNK_BYTES = 4_000_000
#: Random bytes of a job id, 32 letters as a UUID has.
ID_BYTES = 16
#: Bytes of a content's hash as a job id: so long that two requests never meet.
HASH_BYTES = 20


class Request(NamedTuple):
    """What enqueue.lua takes of one job, in its order."""

    job_id: str
    data: bytes
    description: str
    num_texts: int


def one(
    queue: str, texts: str | Sequence[str], job_id: str | None, options: EmbedOptions, settings: JobSettings
) -> Request:
    """One job. Raises InvalidTextError, InvalidJobIdError."""
    checked = check_texts(texts)
    if job_id is None:
        return _requests(queue, [checked], options, settings)[0]
    _refuse_dedupe(settings)
    return _request(check_job_id(job_id), checked, wire.encode_request(checked, options), settings)


def one_a_text(
    queue: str, texts: Iterable[str], job_ids: Iterable[str] | None, options: EmbedOptions, settings: JobSettings
) -> list[Request]:
    """A job a text, in order. Raises InvalidTextError, InvalidJobIdError; what the iterables raise passes through."""
    if isinstance(texts, str):
        raise InvalidTextError("enqueue_many takes a list of texts; enqueue takes one")
    if job_ids is None:
        checked = [[check_text(text, index)] for index, text in enumerate(texts)]
        return _requests(queue, checked, options, settings)
    _refuse_dedupe(settings)
    return [
        _request(job_id, [text], wire.encode_request([text], options), settings)
        for text, job_id in _paired(texts, job_ids)
    ]


def spread(
    queue: str, texts: Sequence[str], per_job: int, options: EmbedOptions, settings: JobSettings
) -> list[Request]:
    """Any number of checked texts over jobs of up to `per_job`. Raises InvalidTextError for none."""
    if not texts:
        check_texts(texts)
    return _requests(queue, list(slice_texts(texts, per_job)), options, settings)


def slice_texts(texts: Iterable[str], per_job: int) -> Iterator[list[str]]:
    """Consecutive slices for one job each, within `per_job` and MAX_JOB_CHARS."""
    part: list[str] = []
    chars = 0
    for text in texts:
        if part and (len(part) == per_job or chars + len(text) > MAX_JOB_CHARS):
            yield part
            part, chars = [], 0
        part.append(text)
        chars += len(text)
    if part:
        yield part


def chunks(requests: Iterable[Request], settings: JobSettings) -> Iterator[list[Request]]:
    """Consecutive slices for one call each, within CHUNK_JOBS, CHUNK_BYTES and what the queue may hold at all."""
    max_jobs = CHUNK_JOBS // (1 + len(settings.depends_on) // 10)
    if settings.max_depth is not None:
        # Whoever waits for room does better with small pieces: workers are not to run dry meanwhile.
        share = settings.max_depth // 4 if settings.block_timeout else settings.max_depth
        max_jobs = max(1, min(max_jobs, share))
    chunk: list[Request] = []
    size = 0
    for request in requests:
        if chunk and (len(chunk) == max_jobs or size + len(request.data) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(request)
        size += len(request.data)
    if chunk:
        yield chunk


def fresh_ids(number: int) -> list[str]:
    """As many ids, by one call of the system's randomness."""
    letters, length = os.urandom(ID_BYTES * number).hex(), 2 * ID_BYTES
    return [letters[start : start + length] for start in range(0, len(letters), length)]


def content_id(queue: str, plain: bytes) -> str:
    """The id of a request under `dedupe`: of its bytes and of its queue, as another may serve another model."""
    return blake2b(queue.encode() + b"\0" + plain, digest_size=HASH_BYTES).hexdigest()


def distinct(requests: Sequence[Request]) -> list[Request]:
    """Each job once, in order: under `dedupe` the same text makes the same job."""
    return list({request.job_id: request for request in requests}.values())


def failure_in(requests: Sequence[Request], job_id: str, error: EmbedqError) -> EmbedqError:
    """A job's error in the count of all the texts that were spread over the jobs."""
    if not isinstance(error, JobFailedError) or error.text_index is None:
        return error
    before = itertools.takewhile(lambda request: request.job_id != job_id, requests)
    return error.of_text(sum(request.num_texts for request in before) + error.text_index)


def _requests(queue: str, jobs: Sequence[list[str]], options: EmbedOptions, settings: JobSettings) -> list[Request]:
    """Jobs of checked texts with ids of our own."""
    plain = [wire.plain_request(texts, options) for texts in jobs]
    ids = [content_id(queue, each) for each in plain] if settings.dedupe else fresh_ids(len(jobs))
    return [
        _request(job_id, texts, wire.pack_request(each), settings)
        for job_id, texts, each in zip(ids, jobs, plain, strict=True)
    ]


def _request(job_id: str, texts: Sequence[str], data: bytes, settings: JobSettings) -> Request:
    return Request(job_id, data, settings.description or _describe(texts), len(texts))


def _describe(texts: Sequence[str]) -> str:
    """What RQ's tools show of a job: how much it is, never what it says."""
    if len(texts) == 1:
        return f"embed 1 text, {len(texts[0])} characters"
    return f"embed {len(texts)} texts, {sum(map(len, texts))} characters"


def _refuse_dedupe(settings: JobSettings) -> None:
    if settings.dedupe:
        raise InvalidJobIdError("a job id and dedupe exclude each other: dedupe makes the id of the request")


_NOTHING = object()


def _paired(texts: Iterable[str], job_ids: Iterable[str]) -> list[tuple[str, str]]:
    """Texts and their ids, checked, each id once."""
    found: dict[str, str] = {}
    # Not zip's own strictness: its ValueError looks like one that the caller's iterators raise.
    for text, job_id in itertools.zip_longest(texts, job_ids, fillvalue=_NOTHING):
        if text is _NOTHING or job_id is _NOTHING:
            raise InvalidJobIdError("there must be as many job_ids as texts")
        checked_id = check_job_id(job_id)
        if checked_id in found:
            raise InvalidJobIdError(f"job id {checked_id} stands twice in job_ids")
        found[checked_id] = check_text(text, len(found))
    return [(text, job_id) for job_id, text in found.items()]
