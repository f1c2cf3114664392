"""Proof that a token budget fits: the micro-batches that take most memory are encoded once before any text is.

Knows lengths and what running out of memory looks like; no model and no device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedq.model.device_errors import is_out_of_memory
from embedq.model.errors import DeviceError
from embedq.model.packing import MAX_PADDING_TOKENS
from embedq.model.runtime import Runtime

#: Gives vectors on the device for sequences of token ids, the longest first; they are let go at once.
Encode = Callable[[Sequence[NDArray[np.int32]]], object]

log = logging.getLogger(__name__)


def proven_budget(encode: Encode, runtime: Runtime, *, longest: int, num_tokens: int) -> int:
    """`num_tokens`, or the largest of its halves that fits. `longest`: tokens of the longest text.

    Raises DeviceError if not even one text of `longest` tokens does.
    """
    began_at = time.monotonic()
    while not _fits(encode, runtime, longest, num_tokens):
        if num_tokens <= longest:
            raise DeviceError(
                f"{runtime.device} has not enough memory for one text of {longest} tokens beside the weights: free"
                " some of it, or choose a smaller dtype or another device"
            )
        halved = max(longest, num_tokens // 2)
        log.warning("%s: out of memory with micro-batches of %d tokens; trying %d", runtime.device, num_tokens, halved)
        num_tokens = halved
    log.info(
        "warmed up in %.1f s: micro-batches of %d tokens fit%s",
        *(time.monotonic() - began_at, num_tokens, _memory_left(runtime)),
    )
    return num_tokens


def _fits(encode: Encode, runtime: Runtime, longest: int, num_tokens: int) -> bool:
    try:
        with runtime.scope():
            for lengths in _worst_lengths(longest, num_tokens):
                encode([np.zeros(length, dtype=np.int32) for length in lengths])
            runtime.synchronize()
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
    else:
        return True
    # Not before the handler has ended: until then the error's traceback holds the tensors.
    with runtime.scope():
        runtime.release_cache()
    return False


def _worst_lengths(longest: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """A micro-batch full of longest texts, and one full of shortest beside a text that pads them all."""
    padding = min(1 + MAX_PADDING_TOKENS, longest, num_tokens)
    return [longest] * max(1, num_tokens // longest), [padding] + [1] * (num_tokens - padding)


def _memory_left(runtime: Runtime) -> str:
    with runtime.scope():
        memory = runtime.memory()
    if memory is None:
        return ""
    free, total, reserved = (num_bytes / 2**30 for num_bytes in (memory.free, memory.total, memory.reserved))
    return f"; {free:.1f} of {total:.1f} GiB are free, torch holds {reserved:.1f} GiB"
