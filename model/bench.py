"""An encoder measured on this machine: speed, fidelity to float32, start-up, latency and memory.

Number types and attention backends take turns, round by round, so that noise hits all alike. Knows no terminal and
no table: `bench_report` makes those of what is found here.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Protocol

import numpy as np

from embedq.model.device import resolve_device
from embedq.model.device_errors import is_out_of_memory
from embedq.model.errors import ModelError, ModelOptionError
from embedq.model.fidelity import Floats, cosines, spearman_on_pairs
from embedq.model.machine import PeakMemory, describe_machine
from embedq.model.samples import CORPORA, CorpusName, corpus
from embedq.model.sentence_encoder import SentenceEncoder

#: Texts of each corpus, by the device's type: what takes a good ten seconds in float32.
NUM_TEXTS: dict[str, dict[CorpusName, int]] = {
    "cpu": {"short": 128, "mixed": 96, "long": 12},
    "cuda": {"short": 8192, "mixed": 4096, "long": 768},
    "mps": {"short": 1024, "mixed": 512, "long": 96},
}
#: Number types by the device's type. A CPU takes float16 too, but computes it at a fraction of float32's speed.
DTYPES = {
    "cpu": ("float32", "bfloat16", "int8"),
    "cuda": ("float32", "bfloat16", "float16", "int8"),
    "mps": ("float32", "bfloat16", "float16"),
}
#: What is measured unless it is chosen; a backend that the device or the dtype does not have is skipped.
ATTENTIONS = {"cpu": ("auto",), "cuda": ("bmm", "sdpa"), "mps": ("bmm", "sdpa")}
#: Tokens of a micro-batch that are tried beside the encoder's default.
BATCH_TOKENS = {
    "cpu": (512, 1024, 2048),
    "cuda": (4096, 8192, 16384, 32768, 65536),
    "mps": (1024, 2048, 4096, 8192),
}
#: The corpus on which those are compared, if it is measured at all; else the first one.
SWEEP_CORPUS = "mixed"
#: Queries encoded one at a time in each round.
SINGLE_TEXTS = 40
#: What the others are compared with.
EXACT = "float32"


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Empty choices mean what suits the device."""

    #: folder or name
    model: str
    device: str = "auto"
    dtypes: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    corpora: tuple[CorpusName, ...] = ()
    rounds: int = 5
    #: of each corpus
    num_texts: int | None = None
    max_batch_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        num_texts = () if self.num_texts is None else (self.num_texts,)
        for name, numbers in (
            ("rounds", (self.rounds,)),
            ("num_texts", num_texts),
            ("max_batch_tokens", self.max_batch_tokens),
        ):
            if any(number < 1 for number in numbers):
                raise ModelOptionError(f"{name} must be above 0, not {min(numbers)}")


@dataclass(frozen=True, slots=True)
class Variant:
    dtype: str
    attention: str

    def __str__(self) -> str:
        return self.dtype if self.attention == "auto" else f"{self.dtype}, attention {self.attention}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """What the encoder refused, and its words."""

    variant: Variant
    reason: str


@dataclass(frozen=True, slots=True)
class Corpus:
    name: CorpusName
    texts: list[str]
    num_tokens: int


@dataclass(slots=True)
class CorpusResult:
    corpus: Corpus
    #: to float32 on the same device
    min_cosine: float
    mean_cosine: float
    #: one number a round
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Result:
    """What was found of one variant so far."""

    variant: Variant
    load_s: float
    #: of the first call: what is compiled, allocated or looked up on first use is in it
    first_batch_s: float
    #: by loading and a pass over all corpora; None where the system does not tell
    peak_bytes: int | None
    #: of the cosines of the shipped pairs with their grades
    spearman: float
    #: float32's subtracted from it
    spearman_difference: float
    corpora: list[CorpusResult]
    #: seconds of the sweep's corpus by tokens of a micro-batch; infinite where memory did not suffice
    sweep: dict[int, list[float]]
    #: seconds of single queries
    latencies_s: list[float] = field(default_factory=list)


class Loader(Protocol):
    def __call__(self, model: str, *, device: str, variant: Variant) -> SentenceEncoder: ...


def load_variant(model: str, *, device: str, variant: Variant) -> SentenceEncoder:
    """Raises ModelError."""
    return SentenceEncoder.load(model, device=device, dtype=variant.dtype, attention=variant.attention)


class EncoderBench:
    """`run` fills `results` and `skipped`; what they hold is whole whenever it is interrupted."""

    def __init__(self, settings: BenchSettings, *, load: Loader = load_variant) -> None:
        """Raises DeviceError for a device that is not here."""
        self.settings = settings
        self.device = resolve_device(settings.device)
        self.machine = describe_machine(self.device)
        self.results: list[Result] = []
        self.skipped: list[Skipped] = []
        self.corpora: list[Corpus] = []
        self._load = load
        self._encoders: list[SentenceEncoder] = []
        self._singles: list[str] = []
        #: float32's vectors of each corpus, and its Spearman
        self._exact: tuple[list[Floats], float] | None = None

    @property
    def variants(self) -> list[Variant]:
        chosen = self.settings.dtypes or DTYPES[self.device.type]
        # float32 first, for the others to be compared with.
        dtypes = sorted(dict.fromkeys(chosen), key=lambda dtype: dtype != EXACT)
        attentions = self.settings.attentions or ATTENTIONS[self.device.type]
        return [Variant(*pair) for pair in product(dtypes, dict.fromkeys(attentions))]

    @property
    def sweep_corpus(self) -> Corpus:
        return next((corpus for corpus in self.corpora if corpus.name == SWEEP_CORPUS), self.corpora[0])

    def run(self, report: Callable[[str, float], None]) -> None:
        """`report` is told what comes next, and which share of the steps is done.

        Raises ModelOptionError if no variant can be had.
        """
        variants = self.variants
        num_steps = len(variants) * (1 + self.settings.rounds)
        for step, variant in enumerate(variants):
            report(f"loading {variant}", step / num_steps)
            try:
                self._prepare(variant)
            except ModelError as err:
                self.skipped.append(Skipped(variant, str(err)))
        if not self.results:
            reasons = dict.fromkeys(skipped.reason for skipped in self.skipped)
            raise ModelOptionError(f"nothing to measure: {'; '.join(reasons)}")
        for number in range(self.settings.rounds):
            for place, (encoder, result) in enumerate(zip(self._encoders, self.results, strict=True)):
                step = (1 + number) * len(variants) + place
                report(f"round {number + 1} of {self.settings.rounds}, {result.variant}", step / num_steps)
                self._measure(encoder, result)
        report("done", 1.0)

    def _prepare(self, variant: Variant) -> None:
        """Load, a first batch, and a pass over everything: it warms up, and its vectors are compared.

        Raises ModelError for a variant that is not offered here or has vectors that are not finite.
        """
        gc.collect()
        memory = PeakMemory(self.device)
        began_at = time.perf_counter()
        encoder = self._load(self.settings.model, device=self.settings.device, variant=variant)
        load_s = time.perf_counter() - began_at
        if not self.corpora:
            self._make_corpora(encoder)
        first_batch_s = _seconds(encoder, self._first_batch(encoder))
        vectors, correlation = self._vectors(encoder)
        for text in self._singles:
            encoder.encode(text)
        peak_bytes = memory.growth_bytes()
        exact, exact_correlation = self._reference(variant, vectors, correlation)
        result = Result(
            variant=variant,
            load_s=load_s,
            first_batch_s=first_batch_s,
            peak_bytes=peak_bytes,
            spearman=correlation,
            spearman_difference=correlation - exact_correlation,
            corpora=list(map(_compared, self.corpora, vectors, exact)),
            sweep={number: [] for number in self._sweep_of(variant)},
        )
        self._encoders.append(encoder)
        self.results.append(result)

    def _make_corpora(self, encoder: SentenceEncoder) -> None:
        def num_tokens(texts: Sequence[str]) -> list[int]:
            return [text.num_tokens for text in encoder.tokenize(texts)]

        for name in dict.fromkeys(self.settings.corpora or CORPORA):
            texts = corpus(name, self.settings.num_texts or NUM_TEXTS[self.device.type][name], num_tokens)
            self.corpora.append(Corpus(name, texts, sum(num_tokens(texts))))
        self._singles = corpus("short", SINGLE_TEXTS, num_tokens, seed=1)

    def _first_batch(self, encoder: SentenceEncoder) -> list[str]:
        """As many texts as fit into one micro-batch."""
        texts = self.sweep_corpus.texts
        ends = np.cumsum([text.num_tokens for text in encoder.tokenize(texts)])
        return texts[: max(1, int(np.searchsorted(ends, encoder.max_batch_tokens, side="right")))]

    def _vectors(self, encoder: SentenceEncoder) -> tuple[list[Floats], float]:
        """(n, d) of each corpus, and the Spearman on the pairs."""
        return [_encode(encoder, corpus.texts) for corpus in self.corpora], spearman_on_pairs(partial(_encode, encoder))

    def _reference(self, variant: Variant, vectors: list[Floats], correlation: float) -> tuple[list[Floats], float]:
        """float32's, from a variant that is measured anyway if there is one."""
        if self._exact is None and variant.dtype == EXACT:
            self._exact = vectors, correlation
        elif self._exact is None:
            encoder = self._load(self.settings.model, device=self.settings.device, variant=Variant(EXACT, "auto"))
            self._exact = self._vectors(encoder)
        return self._exact

    def _sweep_of(self, variant: Variant) -> Sequence[int]:
        """Micro-batches are compared with one attention for each dtype."""
        if any(result.variant.dtype == variant.dtype for result in self.results):
            return ()
        return self.settings.max_batch_tokens or BATCH_TOKENS[self.device.type]

    def _measure(self, encoder: SentenceEncoder, result: Result) -> None:
        """One round of one variant."""
        for found in result.corpora:
            found.seconds.append(_seconds(encoder, found.corpus.texts))
        default = encoder.max_batch_tokens
        for encoder.max_batch_tokens, seconds in result.sweep.items():
            try:
                seconds.append(_seconds(encoder, self.sweep_corpus.texts))
            except (RuntimeError, MemoryError) as err:
                if not is_out_of_memory(err):
                    raise
                seconds.append(math.inf)
        encoder.max_batch_tokens = default
        result.latencies_s += [_seconds(encoder, [text]) for text in self._singles]


def _encode(encoder: SentenceEncoder, texts: Sequence[str]) -> Floats:
    return np.asarray(encoder.encode(texts), dtype=np.float32)


def _seconds(encoder: SentenceEncoder, texts: Sequence[str]) -> float:
    """Tokenisation included. The vectors come back as numpy, so the device has finished."""
    began_at = time.perf_counter()
    encoder.encode(texts)
    return time.perf_counter() - began_at


def _compared(measured: Corpus, vectors: Floats, exact: Floats) -> CorpusResult:
    near = cosines(vectors, exact)
    return CorpusResult(measured, float(near.min()), float(near.mean()))
