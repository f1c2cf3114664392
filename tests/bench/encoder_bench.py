"""The encoder beside its peers: the same weights, texts and threads, one computing at a time, in turns.

sentence-transformers (torch), ONNX Runtime and OpenVINO, each at its best batch size for each corpus; and beside the
limit that the matrix products alone set. Prints the tables and writes them to encoder.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from embedq.model import DeviceError, ModelOptionError, SentenceEncoder
from embedq.model.bench_report import table
from embedq.model.config import read_config
from embedq.model.fidelity import cosines, spearman_on_pairs
from embedq.model.machine import describe_machine
from embedq.model.samples import CORPORA, CorpusName, corpus
from tests.bench import measure
from tests.bench.gemm_limit import GemmLimit, micro_batches
from tests.bench.peer_environment import peer_environment
from tests.bench.peers import Peer

MODEL = "all-mpnet-base-v2"
OUTPUT = Path(__file__).with_name("encoder.md")
NUM_TEXTS: dict[CorpusName, int] = {"short": 192, "mixed": 128, "long": 16}
DTYPES = ("float32", "bfloat16", "int8")
#: A system of peer_process, and its name in the tables.
PEERS = {
    "torch": "sentence-transformers",
    "onnx": "ONNX Runtime float32",
    "openvino-f32": "OpenVINO f32",
    "openvino": "OpenVINO default",
    "onnx-qint8": "ONNX Runtime qint8",
}
#: The peer whose vectors the others' are compared with: transformers in float32.
REFERENCE = "torch"
BATCH_SIZES = (1, 8, 32)
#: Texts that a peer sees before its first measurement.
WARM_UP_TEXTS = 8

HEAD = """\
# The encoder beside its peers

`make bench` writes this file. {model}; medians of {rounds} rounds in which all systems took turns, one computing at a
time, with {threads} threads each; tokenisation is included. Peers run at their best batch size for each corpus, embedq
as it is set by default. `embedq ... times` is embedq's speed in that number type over the row's. Cosines are to
transformers in float32. The matrix products alone are the limit with prepacked weights; in int8 they are torch's
`_int_mm`, which takes them as they are.
"""

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class System:
    """Us or a peer, ready to encode one corpus."""

    name: str
    batch: str
    encode: Callable[[], Vectors]
    seconds: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
    parser.add_argument("--corpus", action="append", choices=CORPORA, help="default: all three")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be above 0")
    with ExitStack() as stack:
        bench = EncoderBench(arguments.rounds, stack)
        compared = [bench.compare(name) for name in arguments.corpus or CORPORA]
        parts = [bench.head(), *compared, bench.fidelity_on_pairs()]
    text = "\n\n".join(parts) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


class EncoderBench:
    """Everything loaded once; `compare` measures one corpus."""

    def __init__(self, rounds: int, stack: ExitStack) -> None:
        self._rounds = rounds
        self._console = Console(stderr=True)
        self._exact = SentenceEncoder.load(MODEL, device="cpu", dtype="float32")
        self._ours = {"float32": self._exact, **self._others()}
        self._limits = {dtype: GemmLimit(read_config(self._exact.path), dtype) for dtype in self._ours}
        self._peers = self._start_peers(stack)

    def _others(self) -> dict[str, SentenceEncoder]:
        loaded = {}
        for dtype in DTYPES[1:]:
            try:
                loaded[dtype] = SentenceEncoder.load(self._exact.path, device="cpu", dtype=dtype)
            except (DeviceError, ModelOptionError) as err:
                self._console.print(f"embedq {dtype} is left out: {err}")
        return loaded

    def _start_peers(self, stack: ExitStack) -> dict[str, Peer]:
        environment = peer_environment(self._console)
        models = environment.models / self._exact.revision
        models.mkdir(exist_ok=True)
        peers = {}
        for system in PEERS:
            self._say(f"loading {PEERS[system]}")
            peers[system] = stack.enter_context(
                Peer(
                    system,
                    # Newest where no export is needed: see peers_constraints.txt.
                    python=Path(sys.executable) if system == REFERENCE else environment.python,
                    model=self._exact.path,
                    models=models,
                    log=environment.logs / f"{system}.log",
                    threads=torch.get_num_threads(),
                )
            )
        return peers

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False)

    def head(self) -> str:
        machine = describe_machine(self._exact.device)
        peers = [
            f"- {PEERS[system]}: {', '.join(f'{name} {number}' for name, number in peer.versions.items())}"
            for system, peer in self._peers.items()
        ]
        text = HEAD.format(model=MODEL, rounds=self._rounds, threads=torch.get_num_threads())
        return "\n".join([text, *(f"- {line}" for line in machine.lines()), *peers])

    def compare(self, name: CorpusName) -> str:
        texts = corpus(name, NUM_TEXTS[name], self._lengths)
        lengths = self._lengths(texts)
        num_tokens = sum(lengths)
        systems = [*self._our_systems(texts), *self._peer_systems(name, texts)]
        self._say(f"{name}: vectors")
        vectors = {system.name: system.encode() for system in systems}
        batches = micro_batches(lengths, self._exact.max_batch_tokens)

        def rate(seconds: Callable[[], float]) -> Callable[[], float]:
            return lambda: num_tokens / seconds()

        candidates = {system.name: rate(system.seconds) for system in systems}
        for dtype, limit in self._limits.items():
            limit.seconds(batches)
            candidates[_limit(dtype)] = rate(lambda limit=limit: limit.seconds(batches))
        self._say(f"{name}: {self._rounds} rounds")
        rows = {row.name: row for row in measure.interleaved(candidates, self._rounds)}
        title = f"## {name.capitalize()}: {len(texts)} texts, {num_tokens:,} tokens"
        near = {system: cosines(found, vectors[PEERS[REFERENCE]]) for system, found in vectors.items()}
        return "\n\n".join([title, self._speeds(systems, rows, near), self._shares(rows, len(batches))])

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [text.num_tokens for text in self._exact.tokenize(texts)]

    def _our_systems(self, texts: list[str]) -> list[System]:
        return [
            System(
                _ours(dtype),
                f"{encoder.max_batch_tokens:,} tokens",
                lambda encoder=encoder: np.asarray(encoder.encode(texts), dtype=np.float32),
                lambda encoder=encoder: measure.seconds(lambda: encoder.encode(texts)),
            )
            for dtype, encoder in self._ours.items()
        ]

    def _peer_systems(self, name: CorpusName, texts: list[str]) -> list[System]:
        systems = []
        for system, peer in self._peers.items():
            self._say(f"{name}: the best batch size of {PEERS[system]}")
            size = _best_batch_size(peer, texts)
            systems.append(
                System(
                    PEERS[system],
                    f"{size} texts",
                    lambda peer=peer, size=size: peer.encode(texts, size),
                    lambda peer=peer, size=size: peer.seconds(texts, size),
                )
            )
        return systems

    def _speeds(self, systems: list[System], rows: dict[str, measure.Row], near: dict[str, Vectors]) -> str:
        head = [
            *("", "batch", "tokens/s", "lowest to highest"),
            *(f"embedq {dtype} times" for dtype in self._ours),
            *("min cosine", "mean cosine"),
        ]
        lines = []
        for system in systems:
            row = rows[system.name]
            ratios = (rows[_ours(dtype)].median / row.median for dtype in self._ours)
            found = near[system.name]
            lines.append(
                [
                    *(system.name, system.batch, f"{row.median:,.0f}", f"{row.lowest:,.0f} to {row.highest:,.0f}"),
                    *(f"{ratio:.2f}" for ratio in ratios),
                    *(f"{found.min():.5f}", f"{found.mean():.5f}"),
                ]
            )
        return table(head, lines)

    def _shares(self, rows: dict[str, measure.Row], num_batches: int) -> str:
        head = ("", f"matrix products alone, {num_batches} micro-batches, tokens/s", "embedq, tokens/s", "share")
        lines = []
        for dtype in self._limits:
            limit, ours = rows[_limit(dtype)].median, rows[_ours(dtype)].median
            lines.append((dtype, f"{limit:,.0f}", f"{ours:,.0f}", f"{ours / limit:.0%}"))
        return table(head, lines)

    def fidelity_on_pairs(self) -> str:
        self._say("sentence pairs")
        found = {
            **{
                _ours(dtype): spearman_on_pairs(lambda texts, e=encoder: np.asarray(e.encode(texts), dtype=np.float32))
                for dtype, encoder in self._ours.items()
            },
            **{
                PEERS[system]: spearman_on_pairs(lambda texts, peer=peer: peer.encode(texts, WARM_UP_TEXTS))
                for system, peer in self._peers.items()
            },
        }
        exact = found[PEERS[REFERENCE]]
        lines = [(name, f"{value:.4f}", f"{value - exact:+.4f}") for name, value in found.items()]
        title = "## Spearman of cosines with the grades of the shipped sentence pairs"
        return f"{title}\n\n{table(('', 'Spearman', 'minus transformers'), lines)}"


def _best_batch_size(peer: Peer, texts: list[str]) -> int:
    """By one pass over half of the texts with each, but no less than the largest batch; they are in random order."""
    some = texts[: max(len(texts) // 2, *BATCH_SIZES)]
    for size in BATCH_SIZES:
        peer.seconds(some[:WARM_UP_TEXTS], size)
    return min(BATCH_SIZES, key=lambda size: peer.seconds(some, size))


def _ours(dtype: str) -> str:
    return f"embedq {dtype}"


def _limit(dtype: str) -> str:
    return f"matrix products {dtype}"


if __name__ == "__main__":
    main()
