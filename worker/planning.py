"""Which texts are encoded together. Pure: numbers in, numbers out; no clock, no Redis, no tensors.

The encoder packs tokens without padding, so a micro-batch costs what its tokens cost; texts of like length
still belong together, because attention runs over groups of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Micro-batches of indices into `lengths` (tokens a text), each index once.

    No micro-batch is over `max_batch_tokens` unless it is one text. Within a batch the lengths ascend; the
    batches come in the order of their most urgent text, the lowest index.
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or tokens + lengths[index] > max_batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return sorted(batches, key=min)


class ClaimBudget:
    """How many bytes of job data fill one micro-batch, learnt from the jobs that went by.

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
        return max(1, int(self._max_batch_tokens / self._tokens_per_byte))

    def learn(self, num_bytes: int, num_tokens: int) -> None:
        """One claim's data came to so many tokens."""
        if num_bytes <= 0:
            return
        ratio = min(self._HIGHEST, max(self._LOWEST, num_tokens / num_bytes))
        self._tokens_per_byte = self._MEMORY * self._tokens_per_byte + (1 - self._MEMORY) * ratio
