"""A stream of texts on a blocking connection: pull, enqueue, wait, hand out. What to do when is `streaming`'s."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis

from embedq.producer import calls
from embedq.producer.errors import EmbedqError, ResultTimeoutError
from embedq.producer.outcomes import Watch
from embedq.producer.results import ResultReader
from embedq.producer.streaming import Enqueued, TextEmbedding, TextStream

#: Does an operation's steps and returns its result.
Run = Callable[[calls.Operation[Any]], Any]


def embed_texts(
    run: Run, client: redis.Redis, stream: TextStream, source: Iterator[str], timeout_s: float | None
) -> Iterator[TextEmbedding]:
    """Raises what the source or a text raises, and ResultTimeoutError after `timeout_s` without any result."""
    reader, watch = ResultReader(client), Watch()

    def wait_for(jobs: Enqueued) -> None:
        """Watches jobs, and takes what those have come to that were there before."""
        watch.add_fresh(jobs.fresh)
        while ended := reader.look(watch, jobs.known):
            jobs = run(stream.take(ended))
            watch.add_fresh(jobs.fresh)

    is_exhausted, silent_s = False, 0.0
    try:
        while not (is_exhausted and stream.is_empty):
            room = 0 if is_exhausted else stream.room
            texts = list(itertools.islice(source, room))
            is_exhausted = is_exhausted or len(texts) < room
            wait_for(run(stream.fill(texts)))
            yield from stream.pop_ready()
            if not watch:
                continue
            must_wait = is_exhausted or not stream.room
            left_s = math.inf if timeout_s is None else max(0.0, timeout_s - silent_s)
            began = time.monotonic()
            news = reader.read(watch, left_s if must_wait else 0)
            silent_s = 0.0 if news or not must_wait else silent_s + time.monotonic() - began
            if timeout_s is not None and must_wait and silent_s >= timeout_s:
                raise ResultTimeoutError(f"no text of the stream came back for {timeout_s:g} s; is a worker running?")
            wait_for(run(stream.take(news)))
            yield from stream.pop_ready()
    finally:
        give_up(run, stream.waiting_jobs())


def give_up(run: Run, job_ids: Sequence[str]) -> None:
    """Cancels. An error under way matters more than one from here; what cannot be canceled expires by itself."""
    with contextlib.suppress(EmbedqError):
        run(calls.cancel_all(job_ids))
