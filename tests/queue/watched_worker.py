"""A worker in this process, on a thread of its own, with its probes and metrics on a free port."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from prometheus_client.parser import text_string_to_metric_families

from embedq.producer.connection import connect
from embedq.worker import EmbedWorker, WorkerSettings
from tests.conftest import until


class UnsignalledWorker(EmbedWorker):
    """Leaves the signals to the main thread, which alone may have them."""

    _own_signals = staticmethod(nullcontext)  # type: ignore[assignment]


class WatchedWorker:
    """Started on entering, stopped on leaving. What it raises comes out there."""

    def __init__(self, url: str, *queues: str, **settings: Any) -> None:
        options = {"model": "noop:8", "metrics_port": 0, **settings}
        self._client = connect(url)
        self.worker = UnsignalledWorker(
            list(queues) or ["embed"], connection=self._client, settings=WorkerSettings(**options)
        )
        self._raised: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            with mock.patch("embedq.worker.worker.leaving_at_once", nullcontext):
                self.worker.work()
        except BaseException as err:
            self._raised.append(err)

    def __enter__(self) -> WatchedWorker:
        self._thread.start()
        until(lambda: self._raised or self._port() is not None)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if hasattr(self.worker, "waiter"):
            self.worker._end_orderly()
        self._thread.join(20)
        self._client.close()
        if self._raised and kind is None:
            raise self._raised[0]

    def _port(self) -> int | None:
        return self.worker.monitor.port if hasattr(self.worker, "monitor") else None

    def ask(self, path: str) -> tuple[int, str]:
        """Status and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port()}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as err:
            with err:
                return err.code, err.read().decode()

    def is_ready(self) -> bool:
        return self.ask("/readyz")[0] == 200

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by its name and labels."""
        families = text_string_to_metric_families(self.ask("/metrics")[1])
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Of one sample. Raises KeyError where there is none."""
        return self.samples()[name, frozenset(labels.items())]


@contextmanager
def watched(url: str, *queues: str, **settings: Any) -> Iterator[WatchedWorker]:
    """One that is ready."""
    with WatchedWorker(url, *queues, **settings) as worker:
        until(worker.is_ready)
        yield worker
