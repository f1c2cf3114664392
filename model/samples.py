"""The sample sentences that ship with the package: what is embedded where nobody gave texts."""

from __future__ import annotations

from importlib.resources import files


def sample_sentences() -> list[str]:
    """Four hundred sentences of everyday English."""
    text = files("embedq.model").joinpath("sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]
