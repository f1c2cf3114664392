"""embedq with the stand-in model that it ships, by the command that a fleet runs."""

from __future__ import annotations

from collections.abc import Sequence

from embedq.producer import EmbedJob, EmbedQueue

PACKAGES = ("embedq", "rq", "redis")
MODEL = "noop:768"


class EmbedqJobs:
    def __init__(self, url: str) -> None:
        self._url = url
        self._queue = EmbedQueue(url)

    def enqueue(self, texts: Sequence[str]) -> EmbedJob:
        return self._queue.enqueue(texts)

    def enqueue_many(self, jobs: Sequence[Sequence[str]]) -> None:
        """A call for all of them where each has one text; that is what the client offers."""
        if all(len(texts) == 1 for texts in jobs):
            self._queue.enqueue_many([texts[0] for texts in jobs])
        else:
            for texts in jobs:
                self._queue.enqueue(texts)

    def result(self, job: EmbedJob, timeout_s: float) -> bytes:
        return job.result(timeout=timeout_s).vectors.tobytes()

    def work(self) -> None:
        from embedq.worker.cli import main

        main(["worker", "--url", self._url, "--model", MODEL])
