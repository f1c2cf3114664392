"""`embed`: any number of texts as jobs, their results as one. Pure: steps for `calls`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence

from embedq.producer import requests
from embedq.producer.calls import News, Operation, WaitFor
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import EmbedqError, JobFailedError, ResultTimeoutError
from embedq.producer.options import EmbedOptions, check_text
from embedq.producer.outcomes import fitting
from embedq.producer.places import Place
from embedq.producer.requests import Request
from embedq.producer.settings import JobSettings
from embedq.producer.vector_cache import VectorCache

#: Texts are spread over jobs of so many, so that several workers share them.
TEXTS_PER_EMBED_JOB = 64
#: The same where each token has a vector: a job's results stay below what a worker refuses (64 MiB).
TEXTS_PER_TOKEN_JOB = 16
#: Seconds that results stay in Redis whose ids nobody else knows.
EMBED_RESULT_TTL_S = 300


def usual_texts_per_job(options: EmbedOptions) -> int:
    return TEXTS_PER_TOKEN_JOB if options.output == "tokens" else TEXTS_PER_EMBED_JOB


def embed(
    place: Place,
    texts: str | Iterable[str],
    options: EmbedOptions,
    settings: JobSettings,
    timeout_s: float | None,
    cache_ttl: int | None,
) -> Operation[Embeddings]:
    """See `EmbedQueue.embed`."""
    everything = [texts] if isinstance(texts, str) else [check_text(text, i) for i, text in enumerate(texts)]
    if cache_ttl is None:
        return (yield from _embed(place, everything, options, settings, timeout_s))
    cache = VectorCache(place, options, cache_ttl)
    parts = yield from cache.look_up(everything)
    places = [place for place, part in enumerate(parts) if part is None]
    if places or not parts:
        missing = [everything[place] for place in places]
        try:
            whole = yield from _embed(place, missing, options, settings, timeout_s)
        except JobFailedError as err:
            if err.text_index is None:
                raise
            raise err.of_text(places[err.text_index]) from err
        if any(part is not None and not part.is_like(whole) for part in parts):
            # The fleet serves other weights by now: nothing of what is kept goes with them.
            missing, places = everything, list(range(len(everything)))
            whole = yield from _embed(place, missing, options, settings, timeout_s)
        found = whole.split()
        with contextlib.suppress(EmbedqError):  # a cache that cannot be written costs no result
            yield from cache.store(zip(missing, found, strict=True))
        for index, part in zip(places, found, strict=True):
            parts[index] = part
    return Embeddings.concatenate([part for part in parts if part is not None])


def _embed(
    place: Place, texts: list[str], options: EmbedOptions, settings: JobSettings, timeout_s: float | None
) -> Operation[Embeddings]:
    """Checked texts, without a cache."""
    made = requests.spread(place.queue, texts, usual_texts_per_job(options), options, settings)
    job_ids = [request.job_id for request in made]  # under dedupe one may stand twice
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        made, _ = yield from place.enqueue_own(made, settings)
        job_ids = [request.job_id for request in made]
        # Under dedupe a job may have been there, or start afresh: then its stream has the entry of its failure.
        parts = yield from _parts(made, options, frozenset(job_ids if settings.dedupe else ()), deadline)
        if len(parts) < len(set(job_ids)):
            rest = "they go on" if settings.dedupe else "what still waited is canceled"
            raise ResultTimeoutError(f"{len(texts):,} texts took more than {timeout_s:g} s; {rest}")
    except GeneratorExit:
        raise  # nobody is left to take a step
    except BaseException:
        if not settings.dedupe:  # else others may wait for the same jobs
            yield from place.give_up(job_ids)
        raise
    return Embeddings.concatenate([parts[job_id] for job_id in job_ids])


def _parts(
    made: Sequence[Request], options: EmbedOptions, known: frozenset[str], deadline: float | None
) -> Operation[dict[str, Embeddings]]:
    """Each job's embeddings; after the deadline only those that were in time. Raises the first failure."""
    num_texts = {request.job_id: request.num_texts for request in made}
    parts: dict[str, Embeddings] = {}
    news = yield WaitFor.enqueued([request.job_id for request in made], known)
    while True:
        for job_id, found in news:
            outcome = fitting(found, num_texts[job_id], options.output)
            if isinstance(outcome, EmbedqError):
                raise requests.failure_in(made, job_id, outcome)
            parts[job_id] = outcome
        if len(parts) == len(num_texts):
            return parts
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        news = yield News(left)
        if left == 0 and not news:
            return parts
