"""A worker's own figures: what it has done, what it could do, and how busy it was in the last seconds.

It writes them beside its name in Redis, where a look at the fleet finds them (`producer.fleet`). Knows the work that
goes by; no Redis and no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from embedq.worker.claims import Claim, Outcome
from embedq.worker.estimates import Capacity
from embedq.worker.telemetry.observer import Encoded, Observer

#: Of the JSON object; raised when a field changes its meaning.
VERSION = 1
#: Seconds that `recent` figures are about, and those of the device's idle share.
RECENT_S, LAST_MINUTE_S = 10.0, 60.0


class Worker(Protocol):
    """What the figures ask of a worker at the moment of a look."""

    def encoding_s(self) -> float:
        """Seconds that the device has been encoding, since the start."""

    def num_held(self) -> int:
        """Jobs in hand."""

    def prefetched_tokens(self) -> int:
        """Claimed and not on the device yet."""

    def tokens_per_byte(self) -> float: ...


class _Sample(NamedTuple):
    """The counters at one moment."""

    at: float
    tokens: int
    num_batches: int
    fill: float
    encoding_s: float


class Figures(Observer):
    """`sample` is to be called about once a second."""

    def __init__(self, worker: Worker, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker = worker
        self._clock = clock
        self._lock = threading.Lock()
        self._labels: dict[str, Any] = {}
        self._max_batch_tokens = 1
        self._capacity = Capacity(1)
        self._jobs = self._texts = self._errors = 0
        self._tokens = self._num_batches = 0
        #: sum of the micro-batches' shares of a full one
        self._fill = 0.0
        self._samples = deque([_Sample(clock(), 0, 0, 0.0, 0.0)])

    def serve(self, max_batch_tokens: int, labels: dict[str, Any]) -> None:
        """Before the first micro-batch. labels: fields that never change."""
        self._max_batch_tokens, self._capacity, self._labels = max_batch_tokens, Capacity(max_batch_tokens), labels

    def encoded(self, batch: Encoded) -> None:
        with self._lock:
            self._tokens += batch.num_tokens
            self._num_batches += 1
            self._fill += batch.num_tokens / self._max_batch_tokens
            self._capacity.learn(batch.num_tokens, batch.took_s)

    def published(self, outcomes: Sequence[Outcome], took_s: float) -> None:  # noqa: ARG002
        ended = [outcome.claim.num_texts for outcome in outcomes if outcome.became in ("finished", "failed")]
        num_errors = sum([outcome.became in ("failed", "retried") for outcome in outcomes])
        with self._lock:
            self._jobs += len(ended)
            self._texts += sum(ended)
            self._errors += num_errors

    def stopped(self, claim: Claim, code: str) -> None:  # noqa: ARG002
        with self._lock:
            self._jobs += 1
            self._texts += claim.num_texts
            self._errors += 1

    def sample(self) -> None:
        now = self._clock()
        encoding_s = self._worker.encoding_s()
        with self._lock:
            self._samples.append(_Sample(now, self._tokens, self._num_batches, self._fill, encoding_s))
            # The oldest one is as old as the longest span, or the first of all.
            while len(self._samples) > 1 and self._samples[1].at <= now - LAST_MINUTE_S:
                self._samples.popleft()

    @property
    def tokens_per_s(self) -> float:
        """The device's capacity; 0 if nothing was encoded yet."""
        return self._capacity.tokens_per_s

    def idle_ratio(self) -> float:
        """Of the last minute, the share in which the device did not encode."""
        self.sample()
        with self._lock:
            busy = _busy(*self._span(LAST_MINUTE_S))
        return 1.0 - busy

    def look(self) -> dict[str, Any]:
        """All but the time. Rounded, so that it settles when nothing happens."""
        self.sample()
        with self._lock:
            before, now = self._span(RECENT_S)
            passed_s = now.at - before.at
            num_batches = now.num_batches - before.num_batches
            return {
                "v": VERSION,
                "jobs": self._jobs,
                "texts": self._texts,
                "tokens": self._tokens,
                "tokens_per_s": round(self._capacity.tokens_per_s, 1),
                "recent_tokens_per_s": round((now.tokens - before.tokens) / passed_s, 1) if passed_s else 0.0,
                "tokens_per_byte": round(self._worker.tokens_per_byte(), 4),
                "fill": round((now.fill - before.fill) / num_batches, 3) if num_batches else 0.0,
                "busy": round(_busy(before, now), 3),
                "held": self._worker.num_held(),
                "prefetched_tokens": self._worker.prefetched_tokens(),
                "errors": self._errors,
                **self._labels,
            }

    def _span(self, seconds: float) -> tuple[_Sample, _Sample]:
        """The latest sample, and the latest that is so much older; the first one where none is."""
        now = self._samples[-1]
        before = self._samples[0]
        for sample in self._samples:
            if sample.at > now.at - seconds:
                break
            before = sample
        return before, now


def _busy(before: _Sample, now: _Sample) -> float:
    passed_s = now.at - before.at
    return min(1.0, max(0.0, (now.encoding_s - before.encoding_s) / passed_s)) if passed_s > 0 else 0.0


def to_json(look: dict[str, Any]) -> bytes:
    return orjson.dumps({**look, "time": round(time.time(), 1)})
