"""Where an awaited stream takes its texts from: any iterable, or an async iterable that may trickle. Knows no Redis."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, Iterable, Iterator
from itertools import islice
from typing import Protocol

from embedq.producer.mailbox import Mailbox
from embedq.producer.outcomes import Outcome
from embedq.producer.tasks import stop


class TextSource(Protocol):
    async def take(self, count: int, *, may_wait: bool) -> tuple[list[str], bool]:
        """Up to `count` texts, and whether there are no more. Raises what the source raises."""

    async def news_or_texts(self, call: Mailbox, timeout_s: float | None) -> list[tuple[str, Outcome]]:
        """The call's news, but [] as soon as there are texts to take."""

    async def close(self) -> None: ...


def text_source(texts: Iterable[str] | AsyncIterable[str]) -> TextSource:
    return AsyncTexts(texts) if isinstance(texts, AsyncIterable) else PlainTexts(iter(texts))


class PlainTexts:
    """There is always a text at hand, until there are no more."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts

    async def take(self, count: int, *, may_wait: bool) -> tuple[list[str], bool]:  # noqa: ARG002
        texts = list(islice(self._texts, count))
        return texts, len(texts) < count

    async def news_or_texts(self, call: Mailbox, timeout_s: float | None) -> list[tuple[str, Outcome]]:  # noqa: ARG002
        return await call.news(time.monotonic())

    async def close(self) -> None:
        """The iterator is the caller's."""


class AsyncTexts:
    """Reads as many texts ahead as are taken at a time, in a task of its own: so they come in batches however they
    trickle.
    """

    def __init__(self, texts: AsyncIterable[str]) -> None:
        self._texts = texts
        self._ahead: deque[str] = deque()
        self._most_ahead = 1
        self._has_room = asyncio.Event()
        self._arrived = asyncio.Event()
        #: Waits for news of jobs, but not longer than until a text arrives.
        self._call: Mailbox | None = None
        self._task: asyncio.Task[None] | None = None

    async def take(self, count: int, *, may_wait: bool) -> tuple[list[str], bool]:
        self._most_ahead = count
        if self._task is None:
            self._task = asyncio.create_task(self._read_ahead(), name="embedq texts")
            self._task.add_done_callback(self._announce)
        while may_wait and not self._ahead and not self._task.done():
            self._arrived.clear()
            await self._arrived.wait()
        texts = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        self._has_room.set()
        if not texts and self._task.done():
            self._task.result()  # raises what the source raised
        return texts, not texts and self._task.done()

    async def news_or_texts(self, call: Mailbox, timeout_s: float | None) -> list[tuple[str, Outcome]]:
        self._call = call
        return await call.news(None if timeout_s is None else time.monotonic() + timeout_s, unless=self._is_ready)

    async def close(self) -> None:
        if self._task is not None:
            await stop([self._task])
            if not self._task.cancelled():
                self._task.exception()  # nobody is left to be told

    async def _read_ahead(self) -> None:
        async for text in self._texts:
            self._ahead.append(text)
            self._announce()
            while len(self._ahead) >= self._most_ahead:
                self._has_room.clear()
                await self._has_room.wait()

    def _announce(self, _: object = None) -> None:
        self._arrived.set()
        if self._call is not None:
            self._call.wake()

    def _is_ready(self) -> bool:
        return bool(self._ahead) or (self._task is not None and self._task.done())
