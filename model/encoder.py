"""The seam between a model and whoever feeds it: what the worker may ask of any encoder.

Knows no model, no device and no queue. `SentenceEncoder` (MPNet) and `NoopEncoder` (a stand-in) fulfil it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

TruncationSide = Literal["right", "left"]
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One text as the encoder takes it."""

    #: (num_tokens,) int32, the special tokens included
    ids: NDArray[np.int32]
    #: whether tokens were cut to fit `max_seq_length`
    truncated: bool

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


class Encoder(Protocol):
    """Texts to vectors in three steps, so that a pipeline can run them on different threads.

    `tokenize` holds no lock of Python's for long, `encode_tokens` is the device's part, `postprocess` is numpy only.
    """

    @property
    def name(self) -> str:
        """What results report as their model, such as `sentence-transformers/all-mpnet-base-v2`."""

    @property
    def revision(self) -> str:
        """Which weights: the hub's commit, or the first 12 hex digits of the weights' SHA-256."""

    @property
    def placement(self) -> str:
        """Device and number type for people, such as `cuda:0 float16`."""

    @property
    def embedding_dim(self) -> int: ...

    @property
    def max_seq_length(self) -> int:
        """Tokens a text may have, special tokens included."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that this model on this device encodes best at a time."""

    def resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """The text put before each input. Raises ModelOptionError for a name the model doesn't have."""

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
    ) -> list[TokenizedText]:
        """Raises TextTooLongError if `truncate` is false and a text has more than `max_seq_length` tokens."""

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """(n, embedding_dim) float32 in the batch's order, before normalisation."""

    def postprocess(
        self,
        vectors: NDArray[np.float32],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
    ) -> NDArray[np.generic]:
        """(n, d) in `precision`: cut to `dimensions`, normalise (None: as the model says), then quantize.

        Raises ModelOptionError for dimensions above the model's or a precision it cannot give.
        """
