"""Chunking: how windows lie, what they hold, and that a text's vector is their mean."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import LONG_TEXTS
from tiny import edit_json

from embedq.model import ModelOptionError, SentenceEncoder, TextTooLongError, tokenizer, windows
from embedq.model.tokenizer import Tokenizer
from embedq.model.windows import checked_overlap, mean_of_windows, window_starts

#: Float32 sums in another order.
TOLERANCE = 2e-6
LONG = " ".join("abcdefghijklmnopqrstuvwxyz"[n % 26] for n in range(500))


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")


@given(st.integers(0, 3000), st.integers(1, 200), st.data())
def test_windows_cover_everything_overlap_enough_and_are_few(num_tokens: int, room: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, room - 1))
    starts = window_starts(num_tokens, room, overlap)
    assert starts[0] == 0
    if num_tokens <= room:
        assert starts == [0]
        return
    assert starts[-1] + room == num_tokens
    steps = [after - before for before, after in pairwise(starts)]
    assert all(1 <= step <= room - overlap for step in steps)
    assert max(steps) - min(steps) <= 1
    assert (len(starts) - 2) * (room - overlap) + room < num_tokens


def test_an_eighth_of_a_window_overlaps_unless_said_otherwise() -> None:
    assert checked_overlap(None, 382) == 47
    assert checked_overlap(None, 3) == 0
    assert checked_overlap(0, 3) == 0
    for overlap in (3, -1, True, 1.5):
        with pytest.raises(
            ModelOptionError, match=f"chunk_overlap must be 0 to 2 tokens with this prompt, not {overlap}"
        ):
            checked_overlap(overlap, 3)
    with pytest.raises(ModelOptionError, match="the prompt leaves no room"):
        checked_overlap(None, 0)


def test_a_text_that_fits_is_one_window_and_what_it_is_without_chunking(encoder: SentenceEncoder) -> None:
    texts = ["the fox", "", "dog " * 62]
    plain = encoder.tokenize(texts, prompt="over ")
    chunked = encoder.tokenize_windows(texts[:2], prompt="over ")
    assert [text.windows[0].ids.tolist() for text in chunked] == [text.ids.tolist() for text in plain[:2]]
    assert [text.num_tokens for text in chunked] == [5, 3]
    assert [len(text.windows) for text in encoder.tokenize_windows(texts)] == [1, 1, 1]
    np.testing.assert_array_equal(encoder.encode(texts, chunk=True), encoder.encode(texts))


def test_windows_are_full_and_hold_the_text_between_special_tokens(encoder: SentenceEncoder) -> None:
    [whole] = Tokenizer(encoder.path, 10_000)([LONG], prompt="", truncate=False, truncation_side="right")
    [text] = encoder.tokenize_windows([LONG], overlap=10)
    assert text.num_tokens == whole.num_tokens == 502
    assert len(text.windows) == 10  # 1 + ceil((500 - 62) / (62 - 10))
    assert not any(window.truncated for window in text.windows)
    for start, window in zip(window_starts(500, 62, 10), text.windows, strict=True):
        assert window.ids.tolist() == [0, *whole.ids[1 + start : 63 + start].tolist(), 2]


def test_the_prompt_stands_before_every_window(encoder: SentenceEncoder) -> None:
    prompt = encoder.tokenize(["the dog "])[0].ids[1:-1].tolist()
    [text] = encoder.tokenize_windows([LONG], prompt="the dog ", overlap=0)
    assert len(text.windows) == 9  # ceil(500 / 60)
    assert text.num_tokens == 504
    assert all(window.ids[1:3].tolist() == prompt and window.num_tokens == 64 for window in text.windows)


def test_a_texts_vector_is_the_mean_of_its_windows_then_cut_and_normalised(encoder: SentenceEncoder) -> None:
    texts = ["the fox", LONG, "", LONG[:300], "dog"]
    means = [encoder.encode_tokens(text.windows).mean(axis=0) for text in encoder.tokenize_windows(texts, overlap=7)]
    wanted = np.stack(means)[:, :9]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    ours = encoder.encode(texts, chunk=True, chunk_overlap=7, dimensions=9)
    np.testing.assert_allclose(ours, wanted, atol=TOLERANCE)
    np.testing.assert_allclose(encoder.encode(texts, chunk=True, chunk_overlap=7, truncate=False, dimensions=9), ours)
    cut_off = encoder.encode(LONG)
    assert not np.allclose(encoder.encode(LONG, chunk=True), cut_off, atol=1e-3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=LONG_TEXTS)
def test_tokens_of_a_long_text_do_not_depend_on_where_it_was_split(tiny_folder: Path, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "CHUNKED_CHARS", 3)
        split = Tokenizer(tiny_folder, 8)._all_ids(text, 0, 6, 0)
    whole = Tokenizer(tiny_folder, 8)._all_ids(text, 0, 6, 0)
    assert split.tolist() == whole.tolist()


def test_too_many_windows_are_refused_before_the_rest_is_tokenised(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = Tokenizer._encode

    def watched(self: Tokenizer, texts: list[str], first: int) -> list[list[int]]:
        calls.append(max(map(len, texts)))
        return encode(self, texts, first)

    monkeypatch.setattr(Tokenizer, "_encode", watched)
    text = "a " * 500_000
    with pytest.raises(
        TextTooLongError, match=r"text 1 has more than the 56,327 tokens that 1,024 windows hold"
    ) as caught:
        encoder.tokenize_windows(["fine", text])
    assert caught.value.text_index == 1
    assert max(calls) <= tokenizer.CHUNKED_CHARS + 1
    assert len(calls) == 3


def test_a_text_at_fault_is_named_by_its_place_in_the_call(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "MAX_WINDOWS", 2)
    monkeypatch.setattr("embedq.model.slices.SLICE_TEXTS", 4)
    with pytest.raises(TextTooLongError) as caught:
        encoder.encode(["fox"] * 10 + [LONG], chunk=True)
    assert caught.value.text_index == 10
    with pytest.raises(TextTooLongError) as caught:
        encoder.encode(["fox"] * 7 + ["dog " * 70], truncate=False)
    assert caught.value.text_index == 7


def test_a_huge_text_without_a_place_to_split_is_tokenised_whole(own_folder: Path) -> None:
    edit_json(own_folder / "tokenizer.json", normalizer={"type": "NFC"})
    ours = SentenceEncoder.load(own_folder, device="cpu").tokenize_windows(["fox " * 30_000], overlap=0)
    assert ours[0].num_tokens == 30_002


def test_the_mean_of_no_texts_is_nothing() -> None:
    assert mean_of_windows(np.empty((0, 3), np.float32), []).shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_overlap": 3}, "chunk_overlap needs chunk=True"),
        ({"output": "tokens", "chunk": True}, "token output is neither chunked nor quantized"),
        ({"output": "tokens", "ranges": np.ones((2, 24))}, "token output is neither chunked nor quantized"),
        ({"output": "tokens", "precision": "binary"}, "token output has precision float32 or float16"),
        ({"output": "words"}, "output must be sentence or tokens, not 'words'"),
        ({"chunk": True, "chunk_overlap": 62}, "chunk_overlap must be 0 to 61"),
        ({"chunk": True, "prompt": "a " * 62}, "the prompt leaves no room"),
    ],
)
def test_options_that_contradict_each_other_are_refused(encoder: SentenceEncoder, options: dict, message: str) -> None:
    with pytest.raises(ModelOptionError, match=message):
        encoder.encode(["a"], **options)
