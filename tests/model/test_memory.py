"""Memory does not grow with the input: peaks measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_folder, write_json, write_modules

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes there"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

MEGABYTE = 1_000_000
#: What encoding may add to the loaded model beyond its result, in bytes.
ALLOWANCE = 300 * MEGABYTE

PRELUDE = """
import resource, sys
from embedq.model import SentenceEncoder
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
encoder = SentenceEncoder.load(sys.argv[1], device="cpu")
encoder.encode(["a " * 60] * 40)
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer as wide as the real model's vectors."""
    folder = write_folder(
        tmp_path_factory.mktemp("wide"),
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=24,
        num_hidden_layers=1,
    )
    write_modules(folder, "Pooling", "Normalize")
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 768})
    return folder


def rise(folder: Path, code: str) -> int:
    """Bytes by which the peak rose over `code`, and what it printed besides is the result's size."""
    whole = f"{PRELUDE}\nbefore = peak()\n{code}\nprint(peak() - before)"
    command = [sys.executable, "-c", whole, str(folder)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=250).stdout)


def test_twenty_thousand_texts_add_their_result_and_a_bound(wide_folder: Path) -> None:
    code = "vectors = encoder.encode(['dog ' * (index % 3) for index in range(20_000)])\nassert len(vectors) == 20_000"
    assert rise(wide_folder, code) < 20_000 * 768 * 4 + ALLOWANCE


def test_bytes_of_twenty_thousand_texts_cost_no_floats_of_them_all(wide_folder: Path) -> None:
    """In slices: the vectors of all texts would be 61 MB, and as much again for each copy on the way to bytes."""
    code = "bits = encoder.encode([''] * 20_000, precision='ubinary')\nassert bits.shape == (20_000, 96)"
    assert rise(wide_folder, code) < 150 * MEGABYTE


def test_fifty_thousand_long_words_do_not_grow_the_tokenizer(wide_folder: Path) -> None:
    """The second half adds nothing: what was seen is not remembered."""
    code = (
        "words = lambda start: ['%d' % index + 'xyz' * 300 for index in range(start, start + 1000)]\n"
        "for start in range(0, 10_000, 1000): encoder.tokenize(words(start))\n"
        "before = peak()\n"
        "for start in range(10_000, 60_000, 1000): encoder.tokenize(words(start))"
    )
    assert rise(wide_folder, code) < 20 * MEGABYTE


def test_a_million_characters_in_windows_cost_some_of_their_tokens(wide_folder: Path) -> None:
    """Window after window of ids and one vector each; the library's own objects only for a piece at a time."""
    code = (
        "[text] = encoder.tokenize_windows(['dog ' * 50_000], overlap=0)\n"
        "before = peak()\n"
        "[text] = encoder.tokenize_windows(['fox ' * 63_000], overlap=0)\n"
        "assert len(text.windows) == 1017"
    )
    assert rise(wide_folder, code) < 30 * MEGABYTE
