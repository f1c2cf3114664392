"""How a long fetch tells somebody that it is moving. Knows neither terminals nor what is being fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

#: Seconds between two looks at a growing folder.
WATCH_INTERVAL_S = 0.2


class Progress(Protocol):
    """What `resolve_model` reports to. `update` may be called from another thread than `start`."""

    def start(self, label: str, total_bytes: int) -> None:
        """A new stage begins; the stage before it is over."""

    def update(self, done_bytes: int) -> None:
        """Bytes done of the present stage, from its beginning."""

    def note(self, text: str) -> None:
        """One line for people: why it waits, or why it goes another way."""


class SilentProgress:
    """The default: a library says nothing unless it is asked to."""

    def start(self, label: str, total_bytes: int) -> None: ...

    def update(self, done_bytes: int) -> None: ...

    def note(self, text: str) -> None: ...


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`, links not followed; files that vanish meanwhile count nothing."""
    total = 0
    try:
        for path in folder.rglob("*"):
            try:
                total += path.lstat().st_size
            except FileNotFoundError:
                continue
    except FileNotFoundError:
        # A folder vanished while it was listed: the count so far will do for a progress bar.
        return total
    return total


@contextmanager
def watching(measure: Callable[[], int], progress: Progress) -> Iterator[None]:
    """Report `measure()` while the body runs: for tools that tell nobody how far they are."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_INTERVAL_S):
            progress.update(measure())

    thread = threading.Thread(target=watch, name="embedq-fetch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
