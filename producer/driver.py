"""Doing the steps of an operation for a caller that blocks. What the steps are is in `calls` and `streaming`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol, TypeVar

from embedq.producer.calls import Fork, News, Pause, RedisStep, WaitFor
from embedq.producer.outcomes import Outcome, Watch
from embedq.producer.results import ResultReader
from embedq.producer.streaming import HandOut, StreamStep, Take, TextEmbedding

Result = TypeVar("Result")


class Waiting(Protocol):
    """The jobs that one operation waits for."""

    def wait_for(self, step: WaitFor) -> list[tuple[str, Outcome]]: ...

    def news(self, step: News) -> list[tuple[str, Outcome]]: ...


class WatchedJobs:
    """Those on one server."""

    def __init__(self, reader: ResultReader) -> None:
        self._reader = reader
        self._watch = Watch()

    def wait_for(self, step: WaitFor) -> list[tuple[str, Outcome]]:
        self._watch.add_fresh(step.fresh)
        return self._reader.look(self._watch, step.known)

    def news(self, step: News) -> list[tuple[str, Outcome]]:
        left_s = math.inf if step.timeout_s is None else step.timeout_s
        return self._reader.read(self._watch, 0 if step.or_texts else left_s)


def drive(
    operation: Generator[StreamStep, Any, Result],
    source: Iterator[str],
    do: Callable[[RedisStep | Pause | Fork], Any],
    waiting: Waiting,
) -> Generator[TextEmbedding, None, Result]:
    """Does one step after the other; what a step ends in is thrown into the operation, the reader's leaving too."""
    try:
        step = next(operation)
        while True:
            reply: Any = None
            try:
                if isinstance(step, HandOut):
                    yield step.item
                elif isinstance(step, Take):
                    texts = list(itertools.islice(source, step.count))
                    reply = texts, len(texts) < step.count
                elif isinstance(step, WaitFor):
                    reply = waiting.wait_for(step)
                elif isinstance(step, News):
                    reply = waiting.news(step)
                else:
                    reply = do(step)
            except BaseException as err:
                step = operation.throw(err)
            else:
                step = operation.send(reply)
    except StopIteration as end:
        result: Result = end.value
        return result
