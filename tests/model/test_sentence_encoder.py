"""The whole way on a tiny model: order, batches, options, errors, threads."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import edit_json, random_sequences

from embedq.model import (
    DeviceError,
    Encoder,
    ModelFormatError,
    ModelNotFoundError,
    ModelOptionError,
    SentenceEncoder,
    TextTooLongError,
    TokenizedText,
)
from embedq.model.embedder import Embedder
from embedq.model.runtime import Memory

TEXTS = ["the fox", "", "dog " * 40, "a, b. c", "over the quick brown dog", "中 é"]
#: Float32 sums in another order.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")


def tokens(lengths: list[int]) -> list[TokenizedText]:
    return [TokenizedText(ids, False) for ids in random_sequences(lengths)]


def test_it_says_what_was_loaded(encoder: SentenceEncoder, tiny_folder: Path) -> None:
    seam: Encoder = encoder
    assert encoder.path == tiny_folder
    assert (seam.embedding_dim, seam.max_seq_length) == (24, 64)
    assert (encoder.device, encoder.dtype) == (torch.device("cpu"), torch.float32)
    assert encoder.default_normalize
    assert encoder.prompts == {}


def test_a_folders_revision_is_the_weights_hash(encoder: SentenceEncoder, tiny_folder: Path) -> None:
    expected = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert encoder.revision == expected[:12]


def test_order_is_kept_and_a_batch_is_its_singles(encoder: SentenceEncoder) -> None:
    together = encoder.encode(TEXTS)
    assert together.shape == (6, 24)
    assert together.dtype == np.float32
    singles = np.concatenate([encoder.encode(text) for text in TEXTS])
    np.testing.assert_allclose(together, singles, atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_one_text_gives_one_row(encoder: SentenceEncoder) -> None:
    assert encoder.encode("the fox").shape == (1, 24)


def test_no_text_gives_no_row(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 24)
    assert encoder.encode_tokens([]).shape == (0, 24)
    assert encoder.encode([], dimensions=16, precision="ubinary").shape == (0, 2)


@pytest.mark.parametrize("max_batch_tokens", [1, 10, 64, 1000])
def test_micro_batches_keep_to_the_budget(
    tiny_folder: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, max_batch_tokens: int
) -> None:
    batches: list[list[int]] = []
    whole = Embedder.encode_packed

    def watched(self: Embedder, sequences: list[Any]) -> torch.Tensor:
        batches.append([len(ids) for ids in sequences])
        return whole(self, sequences)

    batch = tokens([5, 64, 1, 30, 30, 9, 2, 64, 1])
    expected = encoder.encode_tokens(batch)
    monkeypatch.setattr(Embedder, "encode_packed", watched)
    small = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32", max_batch_tokens=max_batch_tokens)
    np.testing.assert_allclose(small.encode_tokens(batch), expected, atol=TOLERANCE * np.abs(expected).max())
    assert all(len(lengths) == 1 or sum(lengths) <= max_batch_tokens for lengths in batches)
    assert [length for lengths in batches for length in lengths] == sorted([5, 64, 1, 30, 30, 9, 2, 64, 1])[::-1]


def test_many_micro_batches_are_copied_out_on_the_way(tiny_folder: Path, encoder: SentenceEncoder) -> None:
    batch = tokens([3] * 50)
    small = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32", max_batch_tokens=3)
    expected = encoder.encode_tokens(batch)
    np.testing.assert_allclose(small.encode_tokens(batch), expected, atol=TOLERANCE * np.abs(expected).max())


def test_options_reach_the_result(encoder: SentenceEncoder) -> None:
    raw = encoder.encode(TEXTS, normalize=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    cut = encoder.encode(TEXTS, dimensions=8)
    np.testing.assert_allclose(cut, raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True), atol=1e-6)
    assert encoder.encode(TEXTS, precision="binary").dtype == np.int8
    assert encoder.encode(TEXTS, precision="float16").dtype == np.float16
    prompted = encoder.encode("fox", prompt="the ")
    np.testing.assert_allclose(prompted, encoder.encode("the fox"), atol=TOLERANCE)
    long = " ".join("abcdefghij" * 10)
    assert not np.allclose(encoder.encode(long), encoder.encode(long, truncation_side="left"))


def test_progress_changes_nothing(encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    assert np.array_equal(encoder.encode(TEXTS, show_progress=True), encoder.encode(TEXTS))


def test_an_over_long_text_is_named_by_its_place_in_the_call(encoder: SentenceEncoder) -> None:
    with pytest.raises(TextTooLongError) as caught:
        encoder.encode(["a"] * 1500 + ["dog " * 70], truncate=False)
    assert caught.value.text_index == 1500


def test_an_unknown_prompt_name_says_which_there_are(encoder: SentenceEncoder) -> None:
    with pytest.raises(ModelOptionError, match="no prompt named 'query'; it has none"):
        encoder.encode("a", prompt_name="query")


@pytest.mark.parametrize("ids", [[0, 999], [-1, 5]])
def test_ids_out_of_range_are_refused(encoder: SentenceEncoder, ids: list[int]) -> None:
    with pytest.raises(ModelOptionError, match="token ids must be 0 to"):
        encoder.encode_tokens([TokenizedText(np.array(ids, np.int32), False)])


@pytest.mark.parametrize("length", [0, 65])
def test_lengths_out_of_range_are_refused(encoder: SentenceEncoder, length: int) -> None:
    bad = TokenizedText(np.full(length, 7, np.int32), False)
    with pytest.raises(ModelOptionError, match=f"text 1 has {length} tokens: this model takes 1 to 64"):
        encoder.encode_tokens([*tokens([3]), bad])


def test_threads_get_what_one_thread_gets(encoder: SentenceEncoder) -> None:
    batches = [tokens([length, 64 - length, 7]) for length in range(1, 64, 4)]
    expected = [encoder.encode_tokens(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(encoder.encode_tokens, batches))
    for ours, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_pools_in_float32(tiny_folder: Path, encoder: SentenceEncoder, dtype: str) -> None:
    half = SentenceEncoder.load(tiny_folder, device="cpu", dtype=dtype)
    vectors = half.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert (vectors * encoder.encode(TEXTS)).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "512", None])
def test_a_budget_that_cannot_be_is_refused(tiny_folder: Path, wrong: Any) -> None:
    encoder = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")
    before = encoder.max_batch_tokens
    with pytest.raises(ModelOptionError, match=f"max_batch_tokens must be a whole number above 0, not {wrong!r}"):
        encoder.max_batch_tokens = wrong
    assert encoder.max_batch_tokens == before
    if wrong is not None:
        with pytest.raises(ModelOptionError, match="max_batch_tokens must be a whole number above 0"):
            SentenceEncoder.load(tiny_folder, device="cpu", max_batch_tokens=wrong)


def test_bad_ways_to_load_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="unknown dtype 'int4'"):
        SentenceEncoder.load(tiny_folder, dtype="int4")
    with pytest.raises(ModelOptionError, match="unknown attention 'flash'"):
        SentenceEncoder.load(tiny_folder, attention="flash")
    with pytest.raises(ModelNotFoundError):
        SentenceEncoder.load(tmp_path / "nowhere")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(own_folder: Path) -> None:
    edit_json(own_folder / "config.json", vocab_size=20)
    with pytest.raises(ModelFormatError, match=r"token id \d+, config.json only 20"):
        SentenceEncoder.load(own_folder, device="cpu")


@pytest.mark.parametrize("attention", ["bmm", "sdpa"])
def test_the_padding_of_a_micro_batch_is_that_of_its_attention(tiny_folder: Path, attention: str) -> None:
    encoder = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32", attention=attention)
    alike = [TokenizedText(np.arange(5, 15, dtype=np.int32), False) for _ in range(3)]
    shorter = TokenizedText(np.arange(5, 13, dtype=np.int32), False)
    assert encoder.padding_ratio([]) == encoder.padding_ratio(alike) == 0
    # Four texts as 10 x 10 each, of which one has 8 tokens.
    assert encoder.padding_ratio([shorter, *alike]) == pytest.approx(1 - (3 * 100 + 64) / 400)
    assert encoder.device_memory() == {}


def test_a_device_with_memory_of_its_own_tells_it(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder._embedder.runtime, "memory", lambda: Memory(4, 100, 20, 10))
    assert encoder.device_memory() == {"allocated": 10, "reserved": 20, "total": 100}
