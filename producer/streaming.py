"""Embedding millions of texts with a bounded number of them under way.

Pure: `TextStream` says how many texts to take next and which steps to do with them (see `calls`), is told what jobs
came to, and hands out results. Whoever has a connection, blocking or awaited, waits for the jobs.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from embedq.producer import requests
from embedq.producer.calls import News, Operation, Step, WaitFor
from embedq.producer.checks import is_int, one_of, shown
from embedq.producer.embedding import usual_texts_per_job
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import (
    EmbedqError,
    InvalidOptionError,
    InvalidTextError,
    JobFailedError,
    QueueConnectionError,
    ResultTimeoutError,
)
from embedq.producer.options import MAX_TEXTS_PER_JOB, EmbedOptions, check_text
from embedq.producer.outcomes import Outcome, fitting
from embedq.producer.places import Place
from embedq.producer.settings import EnqueueKeywords, JobSettings, split_keywords
from embedq.producer.vector_cache import VectorCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OnError = Literal["raise", "yield"]

#: Texts under way: taken from the iterable and not yet handed out.
WINDOW_TEXTS = 4096
MAX_WINDOW_TEXTS = 10_000_000
#: Keywords by which others may come to know of a stream's jobs, so that they are left to expire.
SHARING_KEYWORDS = frozenset({"result_ttl", "dedupe", "group", "on_success", "on_failure"})
#: Seconds without any result after which a stream gives up.
SILENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One text of a stream and what it came to."""

    #: place of the text in the iterable
    index: int
    #: (d,) in the asked precision; of token output (num_tokens, d); (0,) if there is an error
    vector: NDArray[np.generic]
    num_tokens: int
    #: whether the text was longer than the model takes
    truncated: bool
    model: str
    #: why there is no vector
    error: EmbedqError | None = None


@dataclass(frozen=True, slots=True)
class Take:
    """Up to so many texts of the source. The reply: the texts, and whether there are no more."""

    count: int
    #: whether to wait for a text if none is at hand; whoever cannot tell always waits
    may_wait: bool


@dataclass(frozen=True, slots=True)
class HandOut:
    """An item for whoever reads the stream."""

    item: TextEmbedding


StreamStep = Step | Take | HandOut


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """How a stream goes. Raises InvalidOptionError."""

    window: int = WINDOW_TEXTS
    texts_per_job: int = 64
    #: in the order of the texts, else as they come
    ordered: bool = True
    #: what a text that fails does: end the stream with its error, or come out as an item that has it
    on_error: OnError = "raise"
    #: results are deleted as soon as they were read; only for jobs that nobody else can know
    forget: bool = False

    def __post_init__(self) -> None:
        for name, highest in (("window", MAX_WINDOW_TEXTS), ("texts_per_job", MAX_TEXTS_PER_JOB)):
            if not is_int(getattr(self, name), 1, highest):
                raise InvalidOptionError(
                    f"{name} must be a whole number from 1 to {highest}, not {shown(getattr(self, name))}"
                )
        if self.on_error not in get_args(OnError):
            raise InvalidOptionError(f"on_error must be {one_of(get_args(OnError))}, not {shown(self.on_error)}")


def open_stream(
    place: Place,
    keywords: EnqueueKeywords,
    *,
    defaults: EnqueueKeywords,
    window: int,
    ordered: bool,
    texts_per_job: int | None,
    on_error: OnError,
    cache_ttl: int | None,
) -> TextStream:
    """See `EmbedQueue.embed_stream`. Raises InvalidOptionError."""
    is_private = not keywords.keys() & SHARING_KEYWORDS
    options, job_settings = split_keywords({**defaults, **keywords})
    settings = StreamSettings(
        window=window,
        ordered=ordered,
        texts_per_job=usual_texts_per_job(options) if texts_per_job is None else texts_per_job,
        on_error=on_error,
        forget=is_private,
    )
    cache = None if cache_ttl is None else VectorCache(place, options, cache_ttl)
    return TextStream(place, options, job_settings, settings, cache)


class _Part(NamedTuple):
    """The texts of one job and their places in the stream."""

    places: list[int]
    texts: list[str]


class TextStream:
    """The state of one stream. Any call may raise what a text failed with, unless `on_error` is `yield`."""

    def __init__(
        self,
        place: Place,
        options: EmbedOptions,
        job_settings: JobSettings,
        settings: StreamSettings,
        cache: VectorCache | None = None,
    ) -> None:
        self._place, self._options, self._job_settings = place, options, job_settings
        self._settings, self._cache = settings, cache
        #: by job id; under `dedupe` one job may serve several parts
        self._parts: dict[str, list[_Part]] = {}
        #: ordered: what has ended, by place, until all before it has; else in order of their ends
        self._ended: dict[int, TextEmbedding] = {}
        self._ready: deque[TextEmbedding] = deque()
        self._taken = self._handed_out = self._next = 0

    @property
    def room(self) -> int:
        """Texts to take now: a quarter of the window, or none."""
        share = max(1, self._settings.window // 4)
        return share if self._taken - self._handed_out + share <= self._settings.window else 0

    @property
    def is_empty(self) -> bool:
        return self._taken == self._handed_out

    def waiting_jobs(self) -> list[str]:
        """Those to be canceled when the stream is left; under `dedupe` none, since others may wait for them too."""
        return [] if self._job_settings.dedupe else list(self._parts)

    def run(self, timeout_s: float | None) -> Generator[StreamStep, Any, None]:
        """The whole stream, until the source has no more texts. An error thrown in, or the reader's leaving
        (GeneratorExit), cancels what still waits.

        Raises ResultTimeoutError after `timeout_s` without any result.
        """
        is_exhausted, silent_s = False, 0.0
        try:
            while not (is_exhausted and self.is_empty):
                if not is_exhausted and self.room:
                    texts, is_exhausted = yield Take(self.room, may_wait=not self._parts)
                    yield from self._settle(self.fill(texts))
                yield from map(HandOut, self.pop_ready())
                if not self._parts:
                    continue
                began = time.monotonic()
                left_s = None if timeout_s is None else max(0.0, timeout_s - silent_s)
                may_take = not is_exhausted and self.room > 0
                news = yield News(left_s, or_texts=may_take)
                silent_s = 0.0 if news else silent_s + time.monotonic() - began
                if timeout_s is not None and silent_s >= timeout_s and (timeout_s > 0 or not may_take):
                    raise ResultTimeoutError(
                        f"no text of the stream came back for {timeout_s:g} s; is a worker running?"
                    )
                yield from self._settle(self.take(news))
                yield from map(HandOut, self.pop_ready())
        finally:
            yield from self._place.give_up(self.waiting_jobs())

    def _settle(self, enqueueing: Operation[WaitFor]) -> Operation[None]:
        """Waits for what was enqueued, but for jobs that had ended before: they are taken at once."""
        jobs = yield from enqueueing
        while ended := (yield jobs):
            jobs = yield from self.take(ended)

    def fill(self, texts: Sequence[Any]) -> Operation[WaitFor]:
        """Takes texts; those that the cache lacks are enqueued. Raises as `enqueue`."""
        first, self._taken = self._taken, self._taken + len(texts)
        places, checked = [], []
        for place, text in enumerate(texts, start=first):
            try:
                checked.append(check_text(text, place))
                places.append(place)
            except InvalidTextError as err:
                self._fail(place, err)
        if self._cache is not None and checked:
            found = yield from self._cache.look_up(checked)
            for place, embedding in zip(places, found, strict=True):
                if embedding is not None:
                    self._end(_items(embedding, [place])[0])
            left = [index for index, embedding in enumerate(found) if embedding is None]
            places, checked = [places[index] for index in left], [checked[index] for index in left]
        return (yield from self._enqueue(places, checked))

    def take(self, outcomes: Iterable[tuple[str, Outcome]]) -> Operation[WaitFor]:
        """What jobs came to. Texts that shared a job with a guilty one are enqueued again without it."""
        entries: list[tuple[str, Embeddings]] = []
        read: list[str] = []
        innocent = _Part([], [])
        for job_id, found in outcomes:
            for part in self._parts.pop(job_id, ()):
                outcome = fitting(found, len(part.texts), self._options.output)
                if isinstance(outcome, Embeddings):
                    read.append(job_id)
                    entries.extend(self._succeed(part, outcome))
                else:
                    rest = self._fail_part(part, outcome)
                    innocent.places.extend(rest.places)
                    innocent.texts.extend(rest.texts)
        if self._cache is not None and entries:
            with contextlib.suppress(EmbedqError):  # a cache that cannot be written costs no result
                yield from self._cache.store(entries)
        if self._settings.forget and read:
            yield from self._place.forget(read)
        return (yield from self._enqueue(*innocent))

    def pop_ready(self) -> Iterator[TextEmbedding]:
        """Results to hand out, in order if asked. Raises the error of a failed text where it stands."""
        while True:
            if self._settings.ordered:
                item = self._ended.pop(self._next, None)
            else:
                item = self._ready.popleft() if self._ready else None
            if item is None:
                return
            if item.error is not None and self._settings.on_error == "raise":
                raise item.error
            self._next += 1
            self._handed_out += 1
            yield item

    def _enqueue(self, places: list[int], texts: list[str]) -> Operation[WaitFor]:
        if not texts:
            return WaitFor([], [])
        per_job = self._settings.texts_per_job
        jobs = requests.spread(self._place.queue, texts, per_job, self._options, self._job_settings)
        start, under_way = 0, set(self._parts)
        for job in jobs:
            span = slice(start, start + job.num_texts)
            self._parts.setdefault(job.job_id, []).append(_Part(places[span], texts[span]))
            start += job.num_texts
        sent, known = yield from self._place.enqueue_own(jobs, self._job_settings)
        for job, instead in zip(jobs, sent, strict=True):
            if instead.job_id != job.job_id:
                self._parts[instead.job_id] = self._parts.pop(job.job_id)
        if self._job_settings.dedupe:  # also one that starts afresh: its stream has the entry of its failure
            known = frozenset(job.job_id for job in sent)
        return WaitFor.enqueued((job.job_id for job in sent if job.job_id not in under_way), known)

    def _succeed(self, part: _Part, result: Embeddings) -> Iterator[tuple[str, Embeddings]]:
        """Texts with their embeddings, for the cache."""
        for item in _items(result, part.places):
            self._end(item)
        if self._cache is not None:
            yield from zip(part.texts, result.split(), strict=True)

    def _fail_part(self, part: _Part, error: EmbedqError) -> _Part:
        """The texts that deserve another chance: all but the guilty one, if the job's failure names it, and all of a
        job that nobody else knows whose server cannot be reached.
        """
        may_run_twice = self._settings.forget and self._job_settings.retries > 0
        if isinstance(error, QueueConnectionError) and error.retryable and may_run_twice:
            return part  # the job's shard is away; another one takes it
        index = error.text_index if isinstance(error, JobFailedError) else None
        if isinstance(error, JobFailedError) and index is not None:
            guilty = part.places[index]
            error = error.of_text(guilty)
            if self._settings.on_error == "yield":
                self._fail(guilty, error)
                rest = [each for each in zip(part.places, part.texts, strict=True) if each[0] != guilty]
                return _Part([place for place, _ in rest], [text for _, text in rest])
        for place in part.places:
            self._fail(place, error)
        return _Part([], [])

    def _fail(self, place: int, error: EmbedqError) -> None:
        import numpy as np

        self._end(TextEmbedding(place, np.empty(0, np.float32), 0, False, "", error))

    def _end(self, item: TextEmbedding) -> None:
        if self._settings.ordered:
            self._ended[item.index] = item
        else:
            self._ready.append(item)


def _items(result: Embeddings, places: Sequence[int]) -> list[TextEmbedding]:
    rows = result.tokens if result.output == "tokens" else list(result.vectors)
    return [
        TextEmbedding(*each, result.model)
        for each in zip(places, rows, result.num_tokens, result.truncated, strict=True)
    ]
