"""`python -m tests.chaos.poison_worker worker ...` is `embedq worker ...` with an encoder that some texts harm, each in
the way that it names, and that takes the same time for the same texts on any machine.

Knows the encoder's surface; knows no Redis.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from embedq.model import Encoder, NoopEncoder, TokenizedText, TruncationSide
from embedq.worker import worker as worker_module
from embedq.worker.cli import main
from embedq.worker.settings import WorkerSettings

#: What a poison text begins with; its kind follows, and a blank.
MARK = "poison-"
#: Seconds of one micro-batch, and of each of its tokens: full ones are worth having.
BATCH_S, TOKEN_S = 0.01, 0.0002
#: Seconds that a hanging text takes: longer than any watchdog waits.
HANG_S = 3600.0


def _raise(vectors: NDArray[np.float32], place: int) -> None:
    raise RuntimeError("a text that no encoder bears")


def _make_nan(vectors: NDArray[np.float32], place: int) -> None:
    vectors[place] = np.nan


def _run_out_of_memory(vectors: NDArray[np.float32], place: int) -> None:
    raise MemoryError("not even alone")


def _abort(vectors: NDArray[np.float32], place: int) -> None:
    os.abort()


def _hang(vectors: NDArray[np.float32], place: int) -> None:
    time.sleep(HANG_S)


#: By kind, what it does to the vectors in which its text has this place.
HARMS: Mapping[str, Callable[[NDArray[np.float32], int], None]] = {
    "raise": _raise,
    "nan": _make_nan,
    "oom": _run_out_of_memory,
    "abort": _abort,
    "hang": _hang,
}


class PoisonedEncoder(NoopEncoder):
    """Vectors as NoopEncoder's."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(embedding_dim)
        #: kinds by the text's hash, which is all that tokens tell of a text
        self._kinds: dict[bytes, str] = {}

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
    ) -> list[TokenizedText]:
        tokens = super().tokenize(texts, prompt=prompt, truncate=truncate, truncation_side=truncation_side)
        for text, its_tokens in zip(texts, tokens, strict=True):
            if text.startswith(MARK):
                self._kinds[_digest(its_tokens)] = text.removeprefix(MARK).split()[0]
        return tokens

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        time.sleep(BATCH_S + TOKEN_S * sum(text.num_tokens for text in batch))
        vectors = super().encode_tokens(batch)
        for place, text in enumerate(batch):
            if kind := self._kinds.get(_digest(text)):
                HARMS[kind](vectors, place)
        return vectors


def _digest(text: TokenizedText) -> bytes:
    return text.ids[:2].tobytes()


def _load_encoder(settings: WorkerSettings) -> Encoder:
    return PoisonedEncoder(NoopEncoder.parse(settings.model).embedding_dim)


if __name__ == "__main__":
    worker_module.load_encoder = _load_encoder  # type: ignore[attr-defined]
    main()
