"""A worker's process as the suite runs it: `python -m tests.chaos.poison worker ...` is `embedq worker ...` with an
encoder that is slow, and that some texts harm.

What a text does stands at its head (`draws.POISON_MARK`). Knows the encoder's surface; knows no Redis. The poison drill
runs the same encoder with marks and a pace of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from embedq.model import DeviceLostError, Encoder, NoopEncoder, TokenizedText, TruncationSide
from embedq.worker import worker as worker_module
from embedq.worker.cli import main
from embedq.worker.settings import WorkerSettings
from tests.chaos.draws import POISON_MARK

#: Seconds of one micro-batch, and of each of its texts: so that workers die with jobs in hand.
BATCH_S, TEXT_S = 0.03, 0.002
#: Texts in one micro-batch beside which a `crowd` text fits.
CROWD_TEXTS = 4
#: Exit status of a process that `exit` ends.
POISON_EXIT = 77
#: Seconds that `hang` takes: far longer than the watchdog waits.
HANG_S = 60.0


class PoisonedEncoder(NoopEncoder):
    """Vectors as NoopEncoder's."""

    def __init__(
        self,
        embedding_dim: int,
        kind_of: Callable[[str], str],
        seconds_of: Callable[[Sequence[TokenizedText]], float],
    ) -> None:
        """kind_of: what a text does, empty for a good one; seconds_of: what a micro-batch takes."""
        super().__init__(embedding_dim)
        self._kind_of = kind_of
        self._seconds_of = seconds_of
        #: by the text's hash, which is all that tokens tell of a text
        self._poison: dict[bytes, str] = {}

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
    ) -> list[TokenizedText]:
        kinds = [self._kind_of(text) for text in texts]
        for kind in kinds:
            if kind == "tokenize-raise":
                raise RuntimeError("a text that no tokenizer bears")
            if kind == "tokenize-abort":
                os.abort()
        tokens = super().tokenize(texts, prompt=prompt, truncate=truncate, truncation_side=truncation_side)
        self._poison |= {_mark(text): kind for text, kind in zip(tokens, kinds, strict=True) if kind}
        return tokens

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        time.sleep(self._seconds_of(batch))
        vectors = super().encode_tokens(batch)
        for place, text in enumerate(batch):
            if kind := self._poison.get(_mark(text)):
                _ENCODING[kind](vectors, place)
        return vectors


def _kind(text: str) -> str:
    return text.removeprefix(POISON_MARK).partition(":")[0] if text.startswith(POISON_MARK) else ""


def _mark(text: TokenizedText) -> bytes:
    return text.ids[:2].tobytes()


def _raise(vectors: NDArray[np.float32], place: int) -> None:
    raise RuntimeError("a text that no encoder bears")


def _make_nan(vectors: NDArray[np.float32], place: int) -> None:
    vectors[place, 0] = np.nan


def _run_out_of_memory(vectors: NDArray[np.float32], place: int) -> None:
    raise MemoryError("not even alone")


def _run_out_of_memory_in_a_crowd(vectors: NDArray[np.float32], place: int) -> None:
    if len(vectors) > CROWD_TEXTS:
        raise MemoryError(f"{len(vectors)} texts at a time")


def _abort(vectors: NDArray[np.float32], place: int) -> None:
    os.abort()


def _exit(vectors: NDArray[np.float32], place: int) -> None:
    os._exit(POISON_EXIT)


def _hang(vectors: NDArray[np.float32], place: int) -> None:
    time.sleep(HANG_S)


def _lose_device(vectors: NDArray[np.float32], place: int) -> None:
    raise DeviceLostError("the device answers nothing any more")


_ENCODING: dict[str, Callable[[NDArray[np.float32], int], None]] = {
    "raise": _raise,
    "nan": _make_nan,
    "oom": _run_out_of_memory,
    "crowd": _run_out_of_memory_in_a_crowd,
    "abort": _abort,
    "exit": _exit,
    "hang": _hang,
    "lost-device": _lose_device,
}


def run_worker(kind_of: Callable[[str], str], seconds_of: Callable[[Sequence[TokenizedText]], float]) -> None:
    """`embedq`'s command line with a poisoned encoder in the place of the stand-in."""

    def load_encoder(settings: WorkerSettings) -> Encoder:
        return PoisonedEncoder(NoopEncoder.parse(settings.model).embedding_dim, kind_of, seconds_of)

    worker_module.load_encoder = load_encoder  # type: ignore[attr-defined]
    main()


def _seconds(batch: Sequence[TokenizedText]) -> float:
    return BATCH_S + TEXT_S * len(batch)


if __name__ == "__main__":
    run_worker(_kind, _seconds)
