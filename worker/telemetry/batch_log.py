"""Micro-batches in the log: one line a second at most, however many there are; each of them at DEBUG.

A worker does some hundred a second with short texts on a GPU. Knows figures, no jobs.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

#: Seconds between two lines at INFO.
EVERY_S = 1.0

logger = logging.getLogger("embedq.worker")


@dataclass(slots=True)
class Sum:
    """Of the micro-batches since the last line."""

    batches: int = 0
    texts: int = 0
    jobs: int = 0
    tokens: int = 0
    took_s: float = 0.0


class BatchLog:
    """For several threads."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._lock = threading.Lock()
        self._sum = Sum()
        self._told_at = float("-inf")

    def add(self, num_texts: int, num_jobs: int, num_tokens: int, took_s: float) -> None:
        """The first one after a quiet second is told at once, the following together."""
        logger.debug(
            *("micro-batch: %d texts of %d jobs, %d tokens, %.0f ms", num_texts, num_jobs, num_tokens, took_s * 1000),
            extra={"event": "micro_batch", **_fields(num_texts, num_jobs, num_tokens, took_s)},
        )
        with self._lock:
            each = self._sum
            each.batches += 1
            each.texts += num_texts
            each.jobs += num_jobs
            each.tokens += num_tokens
            each.took_s += took_s
        self.tick()

    def tick(self) -> None:
        """Tells what there is, unless the last line is younger than a second. To be called now and then."""
        if time.monotonic() - self._told_at >= EVERY_S:
            self.tell()

    def tell(self) -> None:
        with self._lock:
            told, since_s = self._sum, time.monotonic() - self._told_at
            if not told.batches:
                return
            self._sum, self._told_at = Sum(), time.monotonic()
        fields = _fields(told.texts, told.jobs, told.tokens, told.took_s)
        fill = round(told.tokens / (told.batches * self._max_batch_tokens), 3)
        extra = {"event": "micro_batches", "batches": told.batches, "fill": fill, **fields}
        if told.batches == 1:
            logger.info(
                "micro-batch: %d texts of %d jobs, %d tokens, %.0f ms",
                *(told.texts, told.jobs, told.tokens, told.took_s * 1000),
                extra=extra,
            )
            return
        logger.info(
            "%d micro-batches in %.1f s: %d texts, %d tokens, %.0f tokens/s while encoding, %.0f %% full",
            *(told.batches, since_s, told.texts, told.tokens, fields["tokens_per_s"], 100 * fill),
            extra=extra,
        )


def _fields(num_texts: int, num_jobs: int, num_tokens: int, took_s: float) -> dict[str, float]:
    return {
        "texts": num_texts,
        "jobs": num_jobs,
        "tokens": num_tokens,
        "ms": round(took_s * 1000, 2),
        "tokens_per_s": round(num_tokens / took_s) if took_s > 0 else 0,
    }
