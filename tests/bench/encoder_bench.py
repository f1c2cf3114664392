"""The encoder beside sentence-transformers: the same weights, texts and threads, in one process, in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
from rich.console import Console

from embedq.model import SentenceEncoder
from tests.bench import measure

NUM_TEXTS = 128
#: Log-normal lengths as in search corpora: many short texts, a few long ones.
MEAN_TOKENS, SPREAD = 45, 0.8


def run() -> None:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    encoder = SentenceEncoder.load("all-mpnet-base-v2", device="cpu", dtype="float32")
    reference = SentenceTransformer(str(encoder.path), device="cpu")
    texts = _texts(encoder)
    num_tokens = sum(text.num_tokens for text in encoder.tokenize(texts))

    def rate(encode: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            began_at = time.perf_counter()
            encode()
            return num_tokens / (time.perf_counter() - began_at)

        return once

    def theirs(batch_size: int) -> Callable[[], Any]:
        return lambda: reference.encode(texts, batch_size=batch_size, show_progress_bar=False)

    difference = float(np.abs(encoder.encode(texts) - theirs(8)()).max())
    rows = measure.interleaved(
        {
            "embedq float32": rate(lambda: encoder.encode(texts)),
            "sentence-transformers, batch 8": rate(theirs(8)),
            "sentence-transformers, batch 32": rate(theirs(32)),
        }
    )
    title = f"Encode {NUM_TEXTS} texts, {num_tokens:,} tokens"
    measure.show(title, "tokens/s", rows, "sentence-transformers, batch 8")
    Console().print(f"largest difference of any number: {difference:.1e}")


def _texts(encoder: SentenceEncoder) -> list[str]:
    """Sentences of the demo, joined up to lengths drawn with a fixed seed."""
    lines = files("embedq.model").joinpath("sentences.txt").read_text(encoding="utf-8").splitlines()
    sizes = [text.num_tokens for text in encoder.tokenize(lines)]
    draw = random.Random(0)
    texts = []
    for _ in range(NUM_TEXTS):
        wanted = draw.lognormvariate(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD)
        picked: list[int] = []
        while not picked or sum(sizes[place] for place in picked) < wanted:
            picked.append(draw.randrange(len(lines)))
        texts.append(" ".join(lines[place] for place in picked))
    return texts


if __name__ == "__main__":
    run()
