"""What a worker learns from the work that goes by: how many bytes fill a micro-batch, how long one takes, how many
tokens the device can do. Pure.
"""

from __future__ import annotations

import math


class ClaimBudget:
    """How many bytes of job data come to how many tokens, learnt from the jobs that went by.

    Redis knows the jobs' bytes, not their tokens; claiming by bytes keeps a worker from hoarding what others
    could do, and one claim close to one micro-batch.
    """

    #: Tokens per byte of compressed data to begin with, and bounds against odd corpora.
    _RATIO, _LOWEST, _HIGHEST = 0.25, 0.01, 2.0
    #: Weight of the past after each claim.
    _MEMORY = 0.8

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._tokens_per_byte = self._RATIO

    @property
    def max_bytes(self) -> int:
        """Of one claim."""
        return max(1, int(self._max_batch_tokens / self._tokens_per_byte))

    def tokens(self, num_bytes: int) -> int:
        """What so many bytes of data will come to."""
        return int(num_bytes * self._tokens_per_byte)

    @property
    def tokens_per_byte(self) -> float:
        """Of compressed data."""
        return self._tokens_per_byte

    def learn(self, num_bytes: int, num_tokens: int) -> None:
        """One claim's data came to so many tokens."""
        if num_bytes <= 0:
            return
        ratio = min(self._HIGHEST, max(self._LOWEST, num_tokens / num_bytes))
        self._tokens_per_byte = self._MEMORY * self._tokens_per_byte + (1 - self._MEMORY) * ratio


class EncodeTime:
    """Seconds of a micro-batch as a line over its tokens: least squares in which the past fades."""

    #: Weight of the past after each micro-batch.
    _MEMORY = 0.95

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, num_tokens: int, seconds: float) -> None:
        keep = self._MEMORY
        self._weight = keep * self._weight + 1
        self._x = keep * self._x + num_tokens
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + num_tokens * num_tokens
        self._xy = keep * self._xy + num_tokens * seconds

    def seconds(self, num_tokens: int) -> float:
        """0 as long as nothing was learnt."""
        start_s, per_token_s = self._line()
        return start_s + per_token_s * num_tokens

    def tokens(self, seconds: float) -> int | None:
        """What can be encoded in so much time; None where that is unknown, negative where nothing can."""
        start_s, per_token_s = self._line()
        return int((seconds - start_s) / per_token_s) if per_token_s > 0 else None

    def _line(self) -> tuple[float, float]:
        """Seconds of an empty micro-batch, and of a token; neither below 0. Through the origin until sizes differ."""
        if not self._x:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / variance if variance > 1e-6 * mean_x * mean_x else 0.0
        start = mean_y - slope * mean_x
        if slope <= 0 or start < 0:
            return 0.0, mean_y / mean_x
        return start, slope


class Capacity:
    """Tokens a second of a device that is busy, as its recent micro-batches show it.

    A micro-batch counts as much as it is full: where little is to do they are small, and say little of what could be
    done.
    """

    #: Full micro-batches' worth of tokens after which the past weighs a third of what it did.
    _MEMORY_BATCHES = 64

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._tokens = self._seconds = 0.0

    def learn(self, num_tokens: int, seconds: float) -> None:
        fill = num_tokens / self._max_batch_tokens
        keep = math.exp(-fill / self._MEMORY_BATCHES)
        self._tokens = keep * self._tokens + fill * num_tokens
        self._seconds = keep * self._seconds + fill * seconds

    @property
    def tokens_per_s(self) -> float:
        """0 as long as nothing was learnt."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0
