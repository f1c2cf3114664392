"""Progress for people: a bar on a terminal, a few plain lines anywhere else. Writes to stderr only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final, Protocol

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from embedq.model.progress import Progress

MEGABYTE: Final = 1_000_000
#: Seconds between two lines where there is no terminal.
PLAIN_INTERVAL_S: Final = 10.0
#: Smaller stages end before a plain line about them could be read.
PLAIN_MIN_BYTES: Final = 10_000_000


class ShownProgress(Progress, Protocol):
    """Progress that is shown while the `with` block runs."""

    def __enter__(self) -> ShownProgress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def terminal_progress() -> ShownProgress:
    return BarProgress() if sys.stderr.isatty() else LineProgress()


class BarProgress:
    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._total_bytes = 0

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._complete()
        self._bars.stop()

    def start(self, label: str, total_bytes: int) -> None:
        self._complete()
        self._task = self._bars.add_task(label, total=total_bytes)
        self._total_bytes = total_bytes

    def update(self, done_bytes: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done_bytes)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def _complete(self) -> None:
        self.update(self._total_bytes)


class LineProgress:
    def __init__(self) -> None:
        self._label = ""
        self._total_bytes = 0
        self._last_line = 0.0

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self, label: str, total_bytes: int) -> None:
        self._label, self._total_bytes, self._last_line = label, total_bytes, time.monotonic()
        if total_bytes >= PLAIN_MIN_BYTES:
            self.note(f"{label}: {total_bytes / MEGABYTE:,.0f} MB")

    def update(self, done_bytes: int) -> None:
        now = time.monotonic()
        if self._total_bytes >= PLAIN_MIN_BYTES and now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            self.note(f"{self._label}: {100 * done_bytes // self._total_bytes} %")

    def note(self, text: str) -> None:
        click.echo(text, err=True)
