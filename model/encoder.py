"""The seam between a model and whoever feeds it: what the worker may ask of any encoder.

Knows no model, no device and no queue. `SentenceEncoder` (MPNet) and `NoopEncoder` (a stand-in) fulfil it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

TruncationSide = Literal["right", "left"]
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
#: One vector a text, or the last hidden state of every token.
Output = Literal["sentence", "tokens"]

#: Precisions that are steps of a range.
CALIBRATED = ("int8", "uint8")
#: Precisions that token output has.
TOKEN_PRECISIONS = ("float32", "float16")
#: Windows one text may be chunked into: at an English book's million characters it takes some 800.
MAX_WINDOWS = 1024


# Not frozen: there is one for each text, and a frozen one takes three times as long to make.
@dataclass(slots=True, eq=False)
class TokenizedText:
    """One text as the encoder takes it."""

    #: (num_tokens,) int32, the special tokens included
    ids: NDArray[np.int32]
    #: whether tokens were cut to fit `max_seq_length`
    truncated: bool
    #: how many at the beginning are left out of pooling: a prompt's, where the model says so
    skipped: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ChunkedText:
    """One text as windows of tokens, each of which the encoder takes by itself."""

    #: one where the text fits; all full otherwise
    windows: list[TokenizedText]
    #: of the text as a whole, the special tokens and the prompt counted once
    num_tokens: int


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
    def token_dim(self) -> int:
        """Numbers of one token's vector: the encoder's own width, before pooling and what follows it."""

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

    def tokenize_windows(
        self, texts: Sequence[str], *, prompt: str = "", overlap: int | None = None
    ) -> list[ChunkedText]:
        """Texts longer than the model as windows that share at least `overlap` tokens (None: an eighth of a window).

        The prompt stands before every window. Windows are as few as can be, full, and evenly spread, so that none
        is a short rest with the say of a whole one. Raises ModelOptionError for an overlap or a prompt that leaves
        no room, TextTooLongError for a text of more than MAX_WINDOWS.
        """

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """(n, embedding_dim) float32 in the batch's order, before normalisation.

        Raises NonFiniteError for a vector with NaN or Inf, MemoryError where fewer tokens at a time may fit, and
        DeviceLostError where no further call can work. After each of the others the next call may be made.
        """

    def encode_states(self, batch: Sequence[TokenizedText]) -> list[NDArray[np.float32]]:
        """The last hidden state of every token: a (num_tokens, token_dim) float32 for each text, in order.

        Raises as `encode_tokens`.
        """

    def release_memory(self) -> None:
        """Gives back what is held without being used, once an attempt for which memory ran out is over."""

    def device_memory(self) -> Mapping[str, int]:
        """Bytes `allocated` by tensors, `reserved` by this process and in `total`, of a device with memory of its own;
        else empty. For any thread.
        """

    def padding_ratio(self, batch: Sequence[TokenizedText]) -> float:
        """Of what attention computes for such a batch, the share that is padding: 0 to below 1."""

    def in_float32(self) -> Encoder | None:
        """The same model with float32 numbers, for texts that come out with NaN or Inf; its vectors are as good.

        None if it computes in float32 itself, or its float32 form cannot be had here. Raises DeviceLostError.
        """

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

    @property
    def calibration_digest(self) -> str:
        """Which ranges int8 and uint8 vectors were made with; results carry it. Empty if there are none."""
