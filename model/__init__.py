"""The MPNet encoder as a library: `SentenceEncoder.load(name).encode(texts)`.

Knows tensors, weights, tokenisation and pooling; knows nothing of queues. Importing it does not import torch:
that happens on the first use of `SentenceEncoder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedq.model.calibration import Calibration, shipped_ranges
from embedq.model.encoder import ChunkedText, Encoder, Output, Precision, TokenizedText, TruncationSide
from embedq.model.errors import (
    DeviceError,
    DeviceLostError,
    ModelDownloadError,
    ModelError,
    ModelFormatError,
    ModelIntegrityError,
    ModelNotFoundError,
    ModelOptionError,
    ModelSourceError,
    NonFiniteError,
    OutOfMemoryError,
    TextTooLongError,
    WeightsError,
)
from embedq.model.noop import NoopEncoder
from embedq.model.precision import dequantize

if TYPE_CHECKING:
    from embedq.model.sentence_encoder import SentenceEncoder

__all__ = [
    "Calibration",
    "ChunkedText",
    "DeviceError",
    "DeviceLostError",
    "Encoder",
    "ModelDownloadError",
    "ModelError",
    "ModelFormatError",
    "ModelIntegrityError",
    "ModelNotFoundError",
    "ModelOptionError",
    "ModelSourceError",
    "NonFiniteError",
    "NoopEncoder",
    "OutOfMemoryError",
    "Output",
    "Precision",
    "SentenceEncoder",
    "TextTooLongError",
    "TokenizedText",
    "TruncationSide",
    "WeightsError",
    "dequantize",
    "shipped_ranges",
]


def __getattr__(name: str) -> Any:
    if name != "SentenceEncoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from embedq.model.sentence_encoder import SentenceEncoder

    return SentenceEncoder
