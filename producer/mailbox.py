"""What one awaiting call is told of the jobs that it waits for. Knows no Redis."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from embedq.producer.errors import EmbedqError
from embedq.producer.outcomes import Outcome

#: Decodes a result; called by the call that waits for it, so that a long one holds up no other.
Verdict = Callable[[], Outcome]


class Mailbox:
    """One call: jobs that have ended, and jobs that it is still to be told of."""

    __slots__ = ("_changed", "_ended", "_make_error", "unlooked", "waiting")

    def __init__(self) -> None:
        #: Jobs that have not ended; of these, jobs that nobody has looked at yet.
        self.waiting: set[str] = set()
        self.unlooked: set[str] = set()
        self._ended: deque[tuple[str, Verdict]] = deque()
        self._make_error: Callable[[], EmbedqError] | None = None
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return not self.waiting and not self._ended

    def tell(self, job_id: str, verdict: Verdict | None) -> None:
        """That a job was looked at, or what it came to."""
        self.unlooked.discard(job_id)
        if verdict is not None and job_id in self.waiting:
            self.waiting.discard(job_id)
            self._ended.append((job_id, verdict))
        if self._ended or not self.unlooked:
            self._changed.set()

    def fail(self, make_error: Callable[[], EmbedqError]) -> None:
        """One failure reaches many calls: each raises an error of its own."""
        self._make_error = make_error
        self._changed.set()

    def forget_all(self) -> None:
        """The call waits for no job any longer."""
        self.waiting.clear()
        self.unlooked.clear()

    def wake(self) -> None:
        """Lets `news` ask its `unless` again."""
        self._changed.set()

    async def news(
        self, deadline: float | None, *, unless: Callable[[], bool] = lambda: False
    ) -> list[tuple[str, Outcome]]:
        """Jobs that have ended, at least one; [] after the deadline, but not before each job was looked at once.

        [] also as soon as `unless` holds. Raises what `fail` was told.
        """
        while not self._ended:
            if self._make_error is not None:
                raise self._make_error()
            if unless():
                return []
            left = None if deadline is None or self.unlooked else deadline - time.monotonic()
            if left is not None and left <= 0:
                return []
            self._changed.clear()
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                continue
        ended = [(job_id, verdict()) for job_id, verdict in self._ended]
        self._ended.clear()
        return ended
