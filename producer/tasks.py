"""Ending asyncio tasks for good."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

#: Seconds after which a task is canceled again that has not ended.
CANCEL_AGAIN_S = 0.1


async def stop(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels until it helps: `asyncio.wait_for`, in which redis-py sends, may swallow it before Python 3.12."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
