"""A steady load: what its jobs are, by their ids alone, and the process that enqueues them.

Knows no Redis; the process is `produce`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos.journal import JournalReader
from tests.ops.places import Process

#: Words of a text: from the first to the last number, in turn, so that micro-batches have texts of many lengths.
FEWEST_WORDS, MOST_WORDS = 4, 40
#: One job in so many has several texts.
LARGE_EVERY, LARGE_TEXTS = 10, 4
PRODUCER = "tests.ops.produce"


def job_id(producer: str, number: int) -> str:
    return f"{producer}-{number}"


def texts_of(job_id: str) -> list[str]:
    """The texts of a job of any producer's."""
    number = int(job_id.rpartition("-")[2])
    num_texts = LARGE_TEXTS if number % LARGE_EVERY == LARGE_EVERY - 1 else 1
    return [_text(job_id, number, place) for place in range(num_texts)]


def _text(job_id: str, number: int, place: int) -> str:
    num_words = FEWEST_WORDS + (7 * number + place) % (MOST_WORDS - FEWEST_WORDS + 1)
    return " ".join([f"{job_id}/{place}", *["word"] * (num_words - 1)])


class Load:
    """A context manager: jobs at a steady rate while it is open.

    Attributes: name (of the producer; its jobs' ids begin with it).
    """

    def __init__(
        self,
        url: str,
        name: str,
        per_s: float,
        folder: Path,
        *,
        modules: Sequence[str] = (PRODUCER,),
        sources: Sequence[Path] = (),
    ) -> None:
        """modules: what is run, and what that runs; sources: where their packages are looked for first."""
        self.name = name
        self.per_s = per_s
        self._journal = folder / f"{name}.journal"
        command = [sys.executable, "-m", *modules, url, name, str(per_s), str(self._journal)]
        self._process = Process(name, command, folder, sources)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._process.stop()

    def ids(self) -> list[str]:
        """Of the jobs that Redis has accepted so far."""
        return list(self._accepted())

    def _accepted(self) -> Iterator[str]:
        for record in JournalReader(self._journal).read():
            if record["what"] == "accepted":
                yield from (job_id(self.name, number) for number in range(record["first"], record["end"]))
