"""What `EncoderBench` found as a document for programs and as Markdown for people."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from embedq.model.bench import CorpusResult, EncoderBench, Result
from embedq.model.machine import Machine

MEGABYTE = 1_000_000
#: Where something was not measured: by then it was interrupted, or the system does not tell.
MISSING = "-"

Row = Sequence[str]


def document(bench: EncoderBench, name: str, *, interrupted: bool) -> dict[str, Any]:
    """Plain values for JSON; speeds are tokens and texts a second, None where no round was finished."""
    return {
        "model": name,
        "device": str(bench.device),
        "machine": dataclasses.asdict(bench.machine),
        "rounds": bench.settings.rounds,
        "interrupted": interrupted,
        "corpora": [
            {"name": corpus.name, "texts": len(corpus.texts), "tokens": corpus.num_tokens} for corpus in bench.corpora
        ],
        "variants": [_variant(bench, result) for result in bench.results],
        "skipped": [dataclasses.asdict(skipped.variant) | {"reason": skipped.reason} for skipped in bench.skipped],
    }


def _variant(bench: EncoderBench, result: Result) -> dict[str, Any]:
    return {
        "dtype": result.variant.dtype,
        "attention": result.variant.attention,
        "load_s": result.load_s,
        "first_batch_s": result.first_batch_s,
        "peak_bytes": result.peak_bytes,
        "spearman": result.spearman,
        "spearman_difference": result.spearman_difference,
        "latency_ms": {name: _percentile_ms(result.latencies_s, q) for name, q in (("p50", 50), ("p99", 99))},
        "corpora": [_corpus(found) for found in result.corpora],
        "max_batch_tokens": {
            str(budget): _rate(bench.sweep_corpus.num_tokens, seconds) for budget, seconds in result.sweep.items()
        },
    }


def _corpus(found: CorpusResult) -> dict[str, Any]:
    num_tokens, seconds = found.corpus.num_tokens, found.seconds
    return {
        "name": found.corpus.name,
        "tokens_per_s": _rate(num_tokens, seconds),
        "lowest_tokens_per_s": num_tokens / max(seconds) if seconds else None,
        "highest_tokens_per_s": num_tokens / min(seconds) if seconds else None,
        "texts_per_s": _rate(len(found.corpus.texts), seconds),
        "min_cosine": found.min_cosine,
        "mean_cosine": found.mean_cosine,
    }


def _rate(number: int, seconds: Sequence[float]) -> float | None:
    return number / statistics.median(seconds) if seconds else None


def _percentile_ms(seconds: Sequence[float], q: float) -> float | None:
    return float(np.percentile(seconds, q)) * 1000 if seconds else None


def markdown(found: dict[str, Any]) -> str:
    """The tables of a `document`."""
    parts = [_head(found), _speeds(found), _start_up(found)]
    if any(variant["max_batch_tokens"] for variant in found["variants"]):
        parts.append(_sweep(found))
    parts += [f"Skipped: {one['dtype']}, attention {one['attention']}: {one['reason']}" for one in found["skipped"]]
    if found["interrupted"]:
        parts.append("Interrupted: medians are of the rounds that were finished.")
    return "\n\n".join(parts) + "\n"


def _head(found: dict[str, Any]) -> str:
    machine = Machine(**found["machine"]).lines()
    corpora = "; ".join(f"{one['name']}: {one['texts']:,} texts, {one['tokens']:,} tokens" for one in found["corpora"])
    return (
        f"# {found['model']} on {found['device']}\n\n"
        f"- {machine[0]}\n- {machine[1]}\n"
        f"- {corpora}\n"
        f"- Medians of {found['rounds']} rounds in which all variants took turns; tokenisation is included.\n"
        f"- Cosines and Spearman's difference: to float32 on the same device."
    )


def _speeds(found: dict[str, Any]) -> str:
    head = ("dtype", "attention", "corpus", "tokens/s", "lowest to highest", "texts/s", "min cosine", "mean cosine")
    rows = [
        (
            variant["dtype"],
            variant["attention"],
            corpus["name"],
            _number(corpus["tokens_per_s"]),
            f"{_number(corpus['lowest_tokens_per_s'])} to {_number(corpus['highest_tokens_per_s'])}",
            _number(corpus["texts_per_s"], 1),
            _number(corpus["min_cosine"], 5),
            _number(corpus["mean_cosine"], 5),
        )
        for variant in found["variants"]
        for corpus in variant["corpora"]
    ]
    return table(head, rows)


def _start_up(found: dict[str, Any]) -> str:
    head = (
        *("dtype", "attention", "load s", "first batch s", "peak MB", "one query p50 ms", "p99 ms"),
        *("Spearman", "minus float32's"),
    )
    rows = [
        (
            variant["dtype"],
            variant["attention"],
            _number(variant["load_s"], 2),
            _number(variant["first_batch_s"], 2),
            _number(None if variant["peak_bytes"] is None else variant["peak_bytes"] / MEGABYTE),
            _number(variant["latency_ms"]["p50"], 1),
            _number(variant["latency_ms"]["p99"], 1),
            _number(variant["spearman"], 4),
            f"{variant['spearman_difference']:+.4f}",
        )
        for variant in found["variants"]
    ]
    return table(head, rows)


def _sweep(found: dict[str, Any]) -> str:
    swept = [variant for variant in found["variants"] if variant["max_batch_tokens"]]
    head = ("tokens/s with micro-batches of", *(f"{int(budget):,} tokens" for budget in swept[0]["max_batch_tokens"]))
    rows = [
        (f"{variant['dtype']}, {variant['attention']}", *map(_number, variant["max_batch_tokens"].values()))
        for variant in swept
    ]
    return table(head, rows)


def _number(value: float | None, digits: int = 0) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def table(head: Row, rows: Sequence[Row]) -> str:
    """Markdown, padded so that it reads well as it is."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)
