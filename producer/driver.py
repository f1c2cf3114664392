"""Doing the steps of an operation on a blocking connection. What the steps are is in `calls` and `streaming`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from embedq.producer.calls import News, Pause, RedisStep, WaitFor
from embedq.producer.outcomes import Watch
from embedq.producer.results import ResultReader
from embedq.producer.streaming import HandOut, StreamStep, Take, TextEmbedding

Result = TypeVar("Result")


def drive(
    operation: Generator[StreamStep, Any, Result],
    source: Iterator[str],
    do: Callable[[RedisStep | Pause], Any],
    reader: ResultReader,
) -> Generator[TextEmbedding, None, Result]:
    """Does one step after the other; what a step ends in is thrown into the operation, the reader's leaving too."""
    watch = Watch()
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
                    watch.add_fresh(step.fresh)
                    reply = reader.look(watch, step.known)
                elif isinstance(step, News):
                    left_s = math.inf if step.timeout_s is None else step.timeout_s
                    reply = reader.read(watch, 0 if step.or_texts else left_s)
                else:
                    reply = do(step)
            except BaseException as err:
                step = operation.throw(err)
            else:
                step = operation.send(reply)
    except StopIteration as end:
        result: Result = end.value
        return result
