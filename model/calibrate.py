"""From a model and a sample of texts to its ranges: the work behind `embedq model calibrate`. Writes no file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from embedq.model.calibration import Calibration
from embedq.model.errors import ModelOptionError
from embedq.model.precision import postprocess
from embedq.model.sources import ResolvedModel

#: Below, sentence-transformers warns too.
FEW_TEXTS: Final = 100


def calibrate_model(
    resolved: ResolvedModel, texts: Sequence[str], dimensions: Iterable[int] = (), *, device: str = "auto"
) -> Calibration:
    """Ranges for all dimensions and for each cut given, of vectors as the model makes them by default, in float32.

    Raises ModelOptionError for fewer than two texts or a cut that cannot be, and what loading raises.
    """
    if len(texts) < 2:
        raise ModelOptionError(f"a range takes two texts at least, not {len(texts)}; some hundred make a good one")
    from embedq.model.sentence_encoder import SentenceEncoder

    encoder = SentenceEncoder.load(resolved.path, device=device, dtype="float32")
    counts = {encoder.embedding_dim, *dimensions}
    for count in counts:
        # Asked of no vectors first, so that a cut that cannot be is refused before anything is encoded.
        encoder.postprocess(np.empty((0, encoder.embedding_dim), np.float32), dimensions=count)
    vectors = encoder.encode(texts, normalize=False).astype(np.float32)
    normalized = encoder.default_normalize
    ranges = {}
    for count in counts:
        cut = postprocess(vectors, normalize=normalized, dimensions=count)
        ranges[count] = np.stack((cut.min(axis=0), cut.max(axis=0))).astype(np.float32)
    return Calibration(ranges, normalized)
