"""Texts to token ids: `tokenizer.json` by the tokenizers library, and truncation on top of it.

Knows no model beyond its longest sequence. What the file itself says of padding and truncation is switched off:
texts are packed, and truncation must tell whether it cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import BertPreTokenizer

from embedq.model.encoder import ChunkedText, TokenizedText, TruncationSide
from embedq.model.errors import ModelFormatError, ModelOptionError, TextTooLongError
from embedq.model.windows import check_num_tokens, checked_overlap, window_starts

TOKENIZER_FILE = "tokenizer.json"
#: Texts given to the library at once: bounds the memory of what it returns beyond the ids.
BATCH_TEXTS = 1024
#: Of a longer text only this many characters for each token of room are tokenised at first.
CHARS_PER_TOKEN = 16
#: Growth of that piece while it gives too few tokens.
GROWTH = 8
#: Characters tokenised at once of a text that is chunked: what the library returns is many times its ids.
CHUNKED_CHARS = 1 << 16

_ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
#: CJK Unified Ideographs: BertNormalizer puts spaces around each. They stand for themselves under NFD.
_CJK = "\u4e00-\u9fff"


class Tokenizer:
    """Safe to call from several threads: nothing of it changes after loading."""

    def __init__(
        self, folder: Path, max_seq_length: int, *, lowercase: bool = False, pooled_prompt: bool = True
    ) -> None:
        """`pooled_prompt` false marks each text's prompt tokens as `skipped`."""
        self._path = folder / TOKENIZER_FILE
        self._tokenizer = _load(self._path)
        self._boundary = _boundary_pattern(self._tokenizer)
        if lowercase:
            _prepend_lowercase(self._tokenizer)
        self._prefix, self._suffix = _special_ids(self._tokenizer, self._path)
        self._pooled_prompt = pooled_prompt
        self.max_seq_length = max_seq_length
        self._room = max_seq_length - len(self._prefix) - len(self._suffix)
        if self._room < 0:
            raise ModelFormatError(f"{folder}: max_seq_length {max_seq_length} has no room for the special tokens")

    @property
    def max_id(self) -> int:
        return max(self._tokenizer.get_vocab().values(), default=-1)

    def __call__(
        self, texts: Sequence[str], *, prompt: str, truncate: bool, truncation_side: TruncationSide, first: int = 0
    ) -> list[TokenizedText]:
        """`first` is the place of the first text in the caller's own list, for errors."""
        if truncation_side not in ("right", "left"):
            raise ModelOptionError(f"truncation_side must be 'right' or 'left', not {truncation_side!r}")
        skipped = self._prompt_length(prompt)
        return [
            self._truncate(ids, index, skipped, truncate, truncation_side)
            for index, ids in self._batches(texts, first, prompt, truncation_side)
        ]

    def windows(self, texts: Sequence[str], *, prompt: str, overlap: int | None, first: int = 0) -> list[ChunkedText]:
        """See `Encoder.tokenize_windows`."""
        [prompt_ids] = self._encode([prompt], first) if prompt else [[]]
        overlap = checked_overlap(overlap, self._room - len(prompt_ids))
        skipped = self._prompt_length(prompt)
        return [
            ChunkedText([self._assemble(ids, skipped)], len(ids) + self._num_special)
            if len(ids) <= self._room
            else self._chunk(texts[index - first], index, prompt_ids, skipped, overlap)
            for index, ids in self._batches(texts, first, prompt, "right")
        ]

    def _batches(
        self, texts: Sequence[str], first: int, prompt: str, side: TruncationSide
    ) -> Iterator[tuple[int, list[int]]]:
        """Each text's place and bare ids (see `_bare_ids`)."""
        for start in range(0, len(texts), BATCH_TEXTS):
            batch = texts[start : start + BATCH_TEXTS]
            yield from enumerate(self._bare_ids(batch, first + start, prompt, side), start=first + start)

    @property
    def _num_special(self) -> int:
        return len(self._prefix) + len(self._suffix)

    def _truncate(
        self, ids: list[int], index: int, skipped: int, truncate: bool, side: TruncationSide
    ) -> TokenizedText:
        if len(ids) <= self._room:
            return self._assemble(ids, skipped)
        if not truncate:
            raise TextTooLongError(
                f"text {index} is longer than the {self.max_seq_length} tokens this model takes: shorten it, allow"
                " truncation or chunk it",
                index,
            )
        return self._assemble(ids[: self._room] if side == "right" else ids[len(ids) - self._room :], skipped, True)

    def _assemble(self, ids: Sequence[int], skipped: int, truncated: bool = False) -> TokenizedText:
        whole = np.array([*self._prefix, *ids, *self._suffix], dtype=np.int32)
        # Something is always pooled: where a prompt's last word swallows the text, sentence-transformers pools nothing.
        return TokenizedText(whole, truncated, max(0, min(skipped, len(whole) - 1)))

    def _prompt_length(self, prompt: str) -> int:
        """Tokens to skip: those of the prompt by itself, as sentence-transformers counts them, but the closing one."""
        if self._pooled_prompt or not prompt:
            return 0
        [[_, ids]] = self._batches([prompt], 0, "", "right")
        return self._truncate(ids, 0, 0, True, "right").num_tokens - bool(self._suffix)

    def _chunk(self, text: str, index: int, prompt_ids: list[int], skipped: int, overlap: int) -> ChunkedText:
        room = self._room - len(prompt_ids)
        ids = self._all_ids(text, index, room, overlap)
        starts = window_starts(len(ids), room, overlap)
        windows = [self._assemble([*prompt_ids, *ids[start : start + room].tolist()], skipped) for start in starts]
        return ChunkedText(windows, len(ids) + len(prompt_ids) + self._num_special)

    def _all_ids(self, text: str, index: int, room: int, overlap: int) -> NDArray[np.int32]:
        """Raises TextTooLongError for more than windows may hold, before the rest is tokenised."""
        parts: list[NDArray[np.int32]] = []
        num_tokens = 0
        for piece in self._split(text):
            [ids] = self._encode([piece], index)
            num_tokens += len(ids)
            check_num_tokens(num_tokens, index, room, overlap)
            parts.append(np.array(ids, dtype=np.int32))
        return np.concatenate(parts)

    def _split(self, text: str) -> Iterator[str]:
        """The text in pieces of about CHUNKED_CHARS, cut where tokens surely part."""
        start = 0
        while self._boundary is not None and (found := self._boundary.search(text, start + CHUNKED_CHARS)):
            yield text[start : found.start()]
            start = found.start()
        yield text[start:]

    def _bare_ids(self, texts: Sequence[str], first: int, prompt: str, side: TruncationSide) -> list[list[int]]:
        """Ids without special tokens, at least `room + 1` of them where there are more.

        A long text is tokenised from a piece of it (see `_piece`). The piece's tokens are the text's first (last)
        ones, so more of them than there is room for are proof enough that the text is cut, and where.
        """
        full_texts = [self._with_prompt(text, index, prompt) for index, text in enumerate(texts, start=first)]
        limit = CHARS_PER_TOKEN * (self._room + 1)
        pieces = [self._piece(text, limit, side) for text in full_texts]
        ids = self._encode(pieces, first)
        for place, text in enumerate(full_texts):
            text_limit = limit
            while len(ids[place]) <= self._room and len(pieces[place]) < len(text):
                text_limit *= GROWTH
                pieces[place] = self._piece(text, text_limit, side)
                ids[place] = self._encode([pieces[place]], first + place)[0]
        return ids

    @staticmethod
    def _with_prompt(text: str, index: int, prompt: str) -> str:
        if not isinstance(text, str):
            raise ModelOptionError(f"text {index} must be a str, not {type(text).__name__}")
        return prompt + text

    def _piece(self, text: str, limit: int, side: TruncationSide) -> str:
        """About `limit` characters of the text's beginning (end), cut where tokens surely part."""
        if len(text) <= limit or self._boundary is None:
            return text
        found = self._boundary.search(text, limit if side == "right" else len(text) - limit)
        if found is None:
            return text
        return text[: found.start()] if side == "right" else text[found.start() :]

    def _encode(self, texts: list[str], first: int) -> list[list[int]]:
        try:
            # Releases the GIL; runs on all cores unless TOKENIZERS_PARALLELISM is off.
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as err:
            # What the library says of a lone surrogate: it has no UTF-8.
            index = first + next((place for place, text in enumerate(texts) if not _is_unicode(text)), 0)
            raise ModelOptionError(f"text {index} is not valid Unicode: it has a surrogate without its pair") from err
        except Exception as err:  # the library raises plain Exception
            raise _unusable(self._path, err) from err
        return [encoding.ids for encoding in encodings]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise ModelFormatError(
            f"{path} is missing; write it with transformers:"
            " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises plain Exception
        raise ModelFormatError(f"{path} cannot be read by tokenizers: {err}; fetch the file again") from err
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # BPE and Unigram remember every word they see, long ones too (tokenizers#1539); WordPiece remembers none.
    if hasattr(tokenizer.model, "_resize_cache"):
        tokenizer.model._resize_cache(0)
    return tokenizer


def _prepend_lowercase(tokenizer: tokenizers.Tokenizer) -> None:
    """As sentence-transformers does where `do_lower_case` is set."""
    present = tokenizer.normalizer
    tokenizer.normalizer = NormalizerSequence([Lowercase(), present] if present is not None else [Lowercase()])


def _check_unknown_token(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Without it the first unknown word would fail a job, long after loading."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.model.token_to_id(unknown) is None:
        raise ModelFormatError(f"{path}: unk_token {unknown!r} is not in the vocabulary; fetch the file again")


def _special_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    _check_unknown_token(tokenizer, path)
    try:
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        full = tokenizer.encode("a").ids
    except Exception as err:  # the library raises plain Exception
        raise _unusable(path, err) from err
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            prefix, suffix = full[:start], full[start + len(bare) :]
            _check_ids(tokenizer, [*prefix, *suffix], path)
            return prefix, suffix
    raise ModelFormatError(f"{path}: the post-processor changes the tokens of the text itself")


def _check_ids(tokenizer: tokenizers.Tokenizer, ids: list[int], path: Path) -> None:
    """The post-processor has ids of its own, which the library compares with nothing."""
    for special_id in ids:
        if tokenizer.id_to_token(special_id) is None:
            raise ModelFormatError(f"{path}: the post-processor's token id {special_id} is not in the vocabulary")


def _unusable(path: Path, err: Exception) -> ModelFormatError:
    reason = " ".join(str(err).split())
    return ModelFormatError(f"{path} cannot be used by tokenizers: {reason}; fetch the file again")


def _boundary_pattern(tokenizer: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Characters before which a text may be cut in two so that the parts' tokens are the whole's; None if unsure.

    Sure for BERT's own pipeline: it splits at whitespace, isolates punctuation and ideographs, and treats each
    word by itself. ASCII whitespace and punctuation and CJK ideographs stay what they are through its clean-up.
    An added token ("<mask>") is matched in the raw text, so none of its characters may be cut before.
    """
    normalizer = tokenizer.normalizer
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        not isinstance(normalizer, BertNormalizer)
        or not isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
        or not isinstance(tokenizer.model, WordPiece)
        # Whether such a token is one depends on its neighbours.
        or any(token.single_word for token in added)
    ):
        return None
    reserved = "".join(token.content for token in added)
    if re.search(rf"[\s{_CJK}]", reserved):
        return None
    punctuation = "".join(re.escape(char) for char in _ASCII_PUNCTUATION if char not in reserved)
    ideographs = _CJK if normalizer.handle_chinese_chars else ""
    return re.compile(rf"[ \t\n\r{ideographs}{punctuation}]")
