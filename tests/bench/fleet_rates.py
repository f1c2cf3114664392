"""What one H100 may encode, from published figures: nobody has measured embedq on one. Pure.

all-mpnet-base-v2 is BERT-base with a table of relative positions: 12 layers of 768, and 85 million weights in matrix
products, which make 0.17 GFLOP a token. So figures of BERT-base are taken as they are, and those of BERT-large (24
layers of 1,024: 302 million weights) times 3.56. None of them includes tokenisation, copies or a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedq.model.device import BATCH_TOKENS

#: Weights in matrix products.
BASE_WEIGHTS, LARGE_WEIGHTS = 12 * 12 * 768**2, 24 * 12 * 1024**2
#: Tokens that a sample of MLPerf's BERT task is taken to have. It is SQuAD 1.1, cut at 384; no
#: mean is published with it.
SQUAD_TOKENS = 150


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second of one device."""

    name: str
    tokens_per_s: float
    #: what was published, by whom, and what is made of it here
    source: str


#: TensorRT's demo/BERT, "Inference performance: NVIDIA A100 (40GB)": BERT-base, FP16, 128 texts of 128 tokens take
#: 15.91 ms.
A100_TENSORRT = 128 * 128 / 15.91e-3
#: MLPerf Inference 3.1, closed division, NVIDIA, one H100 SXM 80 GB of a DGX H100, BERT-large at 99%, offline, in 8
#: bits: samples a second.
H100_MLPERF_SAMPLES = 9102.26

RATES = (
    Rate(
        "cautious",
        1.0e6,
        "no faster than TensorRT on an A100: BERT-base, FP16, 128 texts of 128 tokens in 15.91 ms, that is"
        f" {A100_TENSORRT / 1e6:.2f} million tokens/s (NVIDIA/TensorRT, demo/BERT)",
    ),
    Rate(
        "middle",
        2.0e6,
        "twice that; the two chips' peaks in 16 bits are 989 and 312 TFLOP/s, 3.2 to 1",
    ),
    Rate(
        "optimistic",
        2.4e6,
        "half of MLPerf Inference 3.1 (NVIDIA, one H100 SXM, BERT-large 99%, offline, in 8 bits):"
        f" {H100_MLPERF_SAMPLES:,.0f} samples/s, taken as {SQUAD_TOKENS} tokens each, times"
        f" {LARGE_WEIGHTS / BASE_WEIGHTS:.2f} for the smaller model, halved for 16 bits",
    ),
)
#: Tokens of a micro-batch: embedq's default on CUDA.
TOKENS_PER_BATCH = BATCH_TOKENS["cuda"]


@dataclass(frozen=True, slots=True)
class Corpus:
    name: str
    #: mean of a text
    tokens: int


SHORT, PASSAGES = Corpus("sentences", 45), Corpus("passages", 250)
CORPORA = (SHORT, PASSAGES)


def texts_per_batch(tokens_per_text: int) -> int:
    return max(1, TOKENS_PER_BATCH // tokens_per_text)


def texts_per_s(rate: Rate, corpus: Corpus) -> float:
    return rate.tokens_per_s / corpus.tokens
