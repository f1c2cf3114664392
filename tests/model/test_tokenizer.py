"""Token ids against transformers' tokenizer, truncation, and texts too long to tokenise whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import edit_json
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from embedq.model import ModelFormatError, ModelOptionError, TextTooLongError, tokenizer
from embedq.model.encoder import TokenizedText, TruncationSide
from embedq.model.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "\n\t ",
    "the quick brown fox",
    "The Quick, BROWN fox-jumps!",
    "running runs",
    "naïve café É",
    "中文字 the 中",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈 fox",
    "zero\u200bwidth and \x00 control \u0085 chars \ufeff",
    "a <mask> b <pad> <s> </s> [UNK] <unk>",
    "x" * 101,
    "fox " * 200,
    "é́́ combining",
    "\u0130stanbul ﬁ ½",
]
#: Everything that a careless cut could split: words, marks, added tokens, control characters, ideographs.
PIECES = st.sampled_from(
    [
        *"abcé中文 \n\t,.-+<>[]",
        "\u0301",
        "\u0338",
        "\u200b",
        "\x00",
        "\u00a0",
        "\u3000",
        "<mask>",
        "<s>",
        "[UNK]",
        "the ",
    ]
)
LONG_TEXTS = st.lists(PIECES, max_size=80).map("".join)


def tokenize(
    folder: Path,
    texts: list[str],
    max_seq_length: int = 64,
    *,
    prompt: str = "",
    truncate: bool = True,
    side: TruncationSide = "right",
    **options: Any,
) -> list[TokenizedText]:
    tokenizer = Tokenizer(folder, max_seq_length, **options)
    return tokenizer(texts, prompt=prompt, truncate=truncate, truncation_side=side)


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_seq_length", [2, 3, 8, 64])
def test_ids_are_transformers(
    tiny_folder: Path, theirs: PreTrainedTokenizerBase, max_seq_length: int, side: TruncationSide
) -> None:
    theirs.truncation_side = side
    expected = theirs(TEXTS, truncation=True, max_length=max_seq_length, padding=False)["input_ids"]
    ours = tokenize(tiny_folder, TEXTS, max_seq_length, side=side)
    assert [text.ids.tolist() for text in ours] == expected
    whole = theirs(TEXTS, truncation=False, padding=False)["input_ids"]
    assert [text.truncated for text in ours] == [len(ids) > max_seq_length for ids in whole]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=LONG_TEXTS, side=st.sampled_from(["right", "left"]), room=st.integers(0, 12))
def test_a_piece_of_a_long_text_gives_the_tokens_of_the_whole(
    tiny_folder: Path, text: str, side: TruncationSide, room: int
) -> None:
    """With one character a token at first, nearly every text is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "CHARS_PER_TOKEN", 1)
        patch.setattr(tokenizer, "GROWTH", 2)
        pieced = tokenize(tiny_folder, [text], room + 2, side=side)[0]
        patch.setattr(tokenizer, "CHARS_PER_TOKEN", 10**6)
        whole = tokenize(tiny_folder, [text], room + 2, side=side)[0]
    assert pieced.ids.tolist() == whole.ids.tolist()
    assert pieced.truncated == whole.truncated


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("text", ["the fox ", "中", "a,", "fox\n"])
def test_of_a_huge_text_only_a_piece_is_tokenised(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, side: TruncationSide, text: str
) -> None:
    seen = []
    encode = Tokenizer._encode

    def watched(self: Tokenizer, texts: list[str], first: int) -> list[list[int]]:
        seen.extend(len(piece) for piece in texts)
        return encode(self, texts, first)

    monkeypatch.setattr(Tokenizer, "_encode", watched)
    huge = tokenize(tiny_folder, [text * 1_000_000], side=side)[0]
    assert (huge.num_tokens, huge.truncated) == (64, True)
    assert max(seen) < 2000


def test_many_texts_keep_their_order_across_internal_batches(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [text.ids.tolist() for text in tokenize(tiny_folder, TEXTS)]
    monkeypatch.setattr(tokenizer, "BATCH_TEXTS", 4)
    assert [text.ids.tolist() for text in tokenize(tiny_folder, TEXTS)] == expected


def test_a_prompt_stands_before_every_text(tiny_folder: Path) -> None:
    with_prompt, written = tokenize(tiny_folder, ["fox"], prompt="the "), tokenize(tiny_folder, ["the fox"])
    assert with_prompt[0].ids.tolist() == written[0].ids.tolist()


def test_an_over_long_text_is_an_error_if_truncation_is_declined(tiny_folder: Path) -> None:
    with pytest.raises(TextTooLongError, match="text 2 is longer than the 64 tokens") as caught:
        tokenize(tiny_folder, ["fox", "the " * 62, "the " * 63], truncate=False)
    assert caught.value.text_index == 2


def test_a_lone_surrogate_is_an_error_that_names_the_text(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "BATCH_TEXTS", 2)
    with pytest.raises(ModelOptionError, match="text 3 is not valid Unicode"):
        tokenize(tiny_folder, ["a", "b", "c", "x \ud800 y"])


@pytest.mark.parametrize("text", [None, 3, b"fox", ("a", "b")])
def test_what_is_no_text_is_an_error_that_names_it(tiny_folder: Path, text: Any) -> None:
    with pytest.raises(ModelOptionError, match="text 1 must be a str"):
        tokenize(tiny_folder, ["a", text])


def test_an_unknown_side_is_an_error(tiny_folder: Path) -> None:
    with pytest.raises(ModelOptionError, match="'middle'"):
        tokenize(tiny_folder, ["a"], side="middle")  # type: ignore[arg-type]


def test_lowercase_is_put_before_a_normalizer_that_keeps_case(own_folder: Path) -> None:
    edit_json(own_folder / "tokenizer.json", normalizer={"type": "NFC"})
    ids = [tokenize(own_folder, ["THE fox"], lowercase=lowercase)[0].ids.tolist() for lowercase in (False, True)]
    assert ids[0] != ids[1] == tokenize(own_folder, ["the fox"])[0].ids.tolist()


def test_a_tokenizer_of_another_kind_is_never_given_a_piece(own_folder: Path) -> None:
    edit_json(own_folder / "tokenizer.json", normalizer={"type": "NFC"})
    assert Tokenizer(own_folder, 8)._boundary is None


def test_an_added_token_with_a_space_forbids_pieces(own_folder: Path) -> None:
    loaded = tokenizer._load(own_folder / "tokenizer.json")
    assert tokenizer._boundary_pattern(loaded) is not None
    loaded.add_tokens(["two words"])
    assert tokenizer._boundary_pattern(loaded) is None


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_bad_tokenizer_file_is_named(own_folder: Path, content: str | None) -> None:
    path = own_folder / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer(own_folder, 8)


def test_a_length_without_room_for_special_tokens_is_an_error(tiny_folder: Path) -> None:
    with pytest.raises(ModelFormatError, match="max_seq_length 1"):
        Tokenizer(tiny_folder, 1)


def test_an_unknown_token_outside_the_vocabulary_is_an_error_at_load(own_folder: Path) -> None:
    path = own_folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    edit_json(path, model={**model, "unk_token": "[GONE]"})
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: unk_token '\[GONE\]'"):
        Tokenizer(own_folder, 8)


def test_a_special_id_outside_the_vocabulary_is_an_error_at_load(own_folder: Path) -> None:
    path = own_folder / "tokenizer.json"
    processor = json.loads(path.read_text())["post_processor"]
    edit_json(path, post_processor={**processor, "sep": ["</s>", 9999]})
    with pytest.raises(ModelFormatError, match="token id 9999 is not in the vocabulary"):
        Tokenizer(own_folder, 8)


def test_what_the_library_raises_for_a_text_names_the_file(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Tokenizer(own_folder, 8)
    broken = SimpleNamespace(encode_batch_fast=lambda *_, **__: [][1])
    monkeypatch.setattr(ours, "_tokenizer", broken)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json cannot be used"):
        ours(["fox"], prompt="", truncate=True, truncation_side="right")
