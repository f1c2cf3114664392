"""From texts to what enqueue.lua takes: checked, encoded, cut into jobs and calls. Pure; knows no Redis."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from embedq.producer import wire
from embedq.producer.errors import InvalidJobIdError, InvalidTextError
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


class Request(NamedTuple):
    """What enqueue.lua takes of one job, in its order."""

    job_id: str
    data: bytes
    description: str
    num_texts: int


def one(texts: str | Sequence[str], job_id: str | None, options: EmbedOptions, settings: JobSettings) -> Request:
    """One job. Raises InvalidTextError, InvalidJobIdError."""
    checked = check_texts(texts)
    return _request(fresh_id() if job_id is None else check_job_id(job_id), checked, options, settings)


def one_a_text(
    texts: Iterable[str], job_ids: Iterable[str] | None, options: EmbedOptions, settings: JobSettings
) -> list[Request]:
    """A job a text, in order. Raises InvalidTextError, InvalidJobIdError; what the iterables raise passes through."""
    if isinstance(texts, str):
        raise InvalidTextError("enqueue_many takes a list of texts; enqueue takes one")
    if job_ids is None:
        checked = [check_text(text, index) for index, text in enumerate(texts)]
        ids: Iterable[str] = fresh_ids(len(checked))
    else:
        checked, ids = _paired(texts, job_ids)
    return [_request(job_id, [text], options, settings) for job_id, text in zip(ids, checked, strict=True)]


def spread(texts: Sequence[str], per_job: int, options: EmbedOptions, settings: JobSettings) -> list[Request]:
    """Any number of checked texts over jobs of up to `per_job`. Raises InvalidTextError for none."""
    if not texts:
        check_texts(texts)
    slices = list(slice_texts(texts, per_job))
    return [
        _request(job_id, part, options, settings) for job_id, part in zip(fresh_ids(len(slices)), slices, strict=True)
    ]


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


def chunks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Consecutive slices for one call each, within CHUNK_JOBS and CHUNK_BYTES."""
    chunk: list[Request] = []
    size = 0
    for request in requests:
        if chunk and (len(chunk) == CHUNK_JOBS or size + len(request.data) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(request)
        size += len(request.data)
    if chunk:
        yield chunk


def fresh_id() -> str:
    return os.urandom(ID_BYTES).hex()


def fresh_ids(number: int) -> list[str]:
    """As many ids, by one call of the system's randomness."""
    letters, length = os.urandom(ID_BYTES * number).hex(), 2 * ID_BYTES
    return [letters[start : start + length] for start in range(0, len(letters), length)]


def _request(job_id: str, texts: Sequence[str], options: EmbedOptions, settings: JobSettings) -> Request:
    data = wire.encode_request(texts, options)
    return Request(job_id, data, settings.description or _describe(texts), len(texts))


def _describe(texts: Sequence[str]) -> str:
    """What RQ's tools show of a job: how much it is, never what it says."""
    noun = "text" if len(texts) == 1 else "texts"
    return f"embed {len(texts)} {noun}, {sum(map(len, texts))} characters"


_NOTHING = object()


def _paired(texts: Iterable[str], job_ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts and their ids, checked one by one, each id once."""
    checked: list[str] = []
    ids: dict[str, None] = {}
    # Not zip's own strictness: its ValueError looks like one that the caller's iterators raise.
    for text, job_id in itertools.zip_longest(texts, job_ids, fillvalue=_NOTHING):
        if text is _NOTHING or job_id is _NOTHING:
            raise InvalidJobIdError("there must be as many job_ids as texts")
        if check_job_id(job_id) in ids:
            raise InvalidJobIdError(f"job id {job_id} stands twice in job_ids")
        checked.append(check_text(text, len(checked)))
        ids[check_job_id(job_id)] = None
    return checked, list(ids)
