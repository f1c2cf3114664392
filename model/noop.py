"""A deterministic stand-in for a model: unit vectors drawn from a hash of the text.

For tests and benchmarks of applications and of the queue. Knows no language, no weights and no torch: texts that
mean the same get unrelated vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from embedq.model.calibration import UNIT_DIGEST, unit_ranges
from embedq.model.encoder import ChunkedText, Precision, TokenizedText, TruncationSide
from embedq.model.errors import ModelNotFoundError, ModelOptionError, TextTooLongError
from embedq.model.precision import normalize_rows, postprocess
from embedq.model.windows import check_num_tokens, checked_overlap, window_starts

PREFIX = "noop:"
MAX_EMBEDDING_DIM = 65536
MAX_SEQ_LENGTH = 384
#: Bytes of the hash; each picks a row of one table. Carried by the first two ids.
NUM_TABLES = 8
#: From here on each table fills its own slice of the vector; below, slices are too narrow to tell texts apart.
MIN_SLICED_DIM = 128

_SPECIAL_TOKENS = 2
_PADDING_IDS = bytes(4 * MAX_SEQ_LENGTH)


class NoopEncoder:
    """Fulfils `Encoder`. The same text and prompt give the same vector in every process and version.

    int8 and uint8 have the range -1 to 1 in every dimension.
    """

    revision = "noop"
    placement = "cpu"
    max_seq_length = MAX_SEQ_LENGTH
    default_normalize = True
    max_batch_tokens = 16_384
    calibration_digest = UNIT_DIGEST

    def __init__(self, embedding_dim: int) -> None:
        if not 1 <= embedding_dim <= MAX_EMBEDDING_DIM:
            raise ModelNotFoundError(
                f"{PREFIX}{embedding_dim}: the dimension must be 1 to {MAX_EMBEDDING_DIM}, such as {PREFIX}768"
            )
        self.embedding_dim = embedding_dim
        self.token_dim = embedding_dim
        self.name = f"{PREFIX}{embedding_dim}"

    @classmethod
    def parse(cls, name: str) -> NoopEncoder:
        """`noop:768` -> NoopEncoder(768). Raises ModelNotFoundError for anything else."""
        prefix, _, dim = name.partition(":")
        if prefix != "noop" or not (dim.isascii() and dim.isdigit() and len(dim) < 10):
            raise ModelNotFoundError(
                f"{name!r} is no stand-in model: write {PREFIX} and a dimension, such as {PREFIX}768"
            )
        return cls(int(dim))

    def resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            return prompt
        if prompt_name is not None:
            raise ModelOptionError(f"{self.name} has no prompts, so none named {prompt_name!r}")
        return ""

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
    ) -> list[TokenizedText]:
        """One token a word and two more, as if for <s> and </s>."""
        if prompt:
            texts = [prompt + text for text in texts]
        counts = [len(text.split()) + _SPECIAL_TOKENS for text in texts]
        if max(counts, default=0) > MAX_SEQ_LENGTH:
            return [self._tokenize_one(index, text, truncate, truncation_side) for index, text in enumerate(texts)]
        ids = np.frombuffer(
            b"".join([_ids(index, texts[index], count) for index, count in enumerate(counts)]), np.int32
        )
        ends = list(accumulate(counts))
        return [TokenizedText(ids[end - count : end], False) for end, count in zip(ends, counts, strict=True)]

    def _tokenize_one(self, index: int, text: str, truncate: bool, side: TruncationSide) -> TokenizedText:
        words = text.split()
        if len(words) <= MAX_SEQ_LENGTH - _SPECIAL_TOKENS:
            return _tokenized(index, text, len(words), False)
        if not truncate:
            raise TextTooLongError(
                f"text {index} has {len(words) + _SPECIAL_TOKENS} tokens, {self.name} takes {MAX_SEQ_LENGTH}", index
            )
        room = MAX_SEQ_LENGTH - _SPECIAL_TOKENS
        words = words[:room] if side == "right" else words[-room:]
        # Like a real model: what was cut away has no say in the vector.
        return _tokenized(index, " ".join(words), room, True)

    def tokenize_windows(
        self, texts: Sequence[str], *, prompt: str = "", overlap: int | None = None
    ) -> list[ChunkedText]:
        """Windows of words, the prompt's before each."""
        room = MAX_SEQ_LENGTH - _SPECIAL_TOKENS - len(prompt.split())
        overlap = checked_overlap(overlap, room)
        return [self._chunk(index, text, prompt, room, overlap) for index, text in enumerate(texts)]

    def _chunk(self, index: int, text: str, prompt: str, room: int, overlap: int) -> ChunkedText:
        whole = prompt + text
        num_words = len(whole.split())
        if num_words <= MAX_SEQ_LENGTH - _SPECIAL_TOKENS:
            return ChunkedText([_tokenized(index, whole, num_words, False)], num_words + _SPECIAL_TOKENS)
        words = text.split()
        check_num_tokens(len(words), index, room, overlap)
        prompt_words = prompt.split()
        windows = [[*prompt_words, *words[start : start + room]] for start in window_starts(len(words), room, overlap)]
        return ChunkedText(
            [_tokenized(index, " ".join(window), len(window), False) for window in windows],
            len(prompt_words) + len(words) + _SPECIAL_TOKENS,
        )

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        return self._vectors(b"".join([text.ids[:2].tobytes() for text in batch]))

    def encode_states(self, batch: Sequence[TokenizedText]) -> list[NDArray[np.float32]]:
        """Unit vectors from a hash of the text and the token's place."""
        return [self._states(text) for text in batch]

    def release_memory(self) -> None:
        """It holds none."""

    def device_memory(self) -> dict[str, int]:
        return {}

    def padding_ratio(self, batch: Sequence[TokenizedText]) -> float:  # noqa: ARG002
        return 0.0

    def in_float32(self) -> None:
        """It is that already."""

    def _states(self, text: TokenizedText) -> NDArray[np.float32]:
        head = text.ids[:2].tobytes()
        places = (place.to_bytes(4, "little") for place in range(text.num_tokens))
        return self._vectors(b"".join(blake2b(head + place, digest_size=NUM_TABLES).digest() for place in places))

    def _vectors(self, digests: bytes) -> NDArray[np.float32]:
        """(n, embedding_dim) from n hashes of NUM_TABLES bytes."""
        num_vectors = len(digests) // NUM_TABLES
        if not num_vectors:
            return np.empty((0, self.embedding_dim), dtype=np.float32)
        hashes = np.frombuffer(digests, dtype=np.uint8)
        rows = hashes.reshape(-1, NUM_TABLES) + 256 * np.arange(NUM_TABLES)  # (n, 8) into the stacked tables
        if self.embedding_dim < MIN_SLICED_DIM:
            return normalize_rows(self._tables[rows].sum(axis=1))
        vectors = self._tables.take(rows, axis=0).reshape(num_vectors, -1)  # (n, 8 * width)
        if self._is_unit:
            return vectors
        return normalize_rows(vectors[:, : self.embedding_dim])

    @property
    def _is_unit(self) -> bool:
        """Whether vectors are of unit length as they come: eight slices of length 1/sqrt(8) each."""
        return self.embedding_dim >= MIN_SLICED_DIM and self.embedding_dim % NUM_TABLES == 0

    @cached_property
    def _tables(self) -> NDArray[np.float32]:
        """(8 * 256, width) pseudo-random rows; where they are slices, each of length 1/sqrt(8)."""
        sliced = self.embedding_dim >= MIN_SLICED_DIM
        width = -(-self.embedding_dim // NUM_TABLES) if sliced else self.embedding_dim
        # PCG64's raw stream is fixed by numpy's policy; its distributions are not, so none is used.
        bits = np.random.PCG64(0).random_raw(NUM_TABLES * 256 * width)
        uniform = (bits >> np.uint64(40)).astype(np.float32) - np.float32(2**23)
        rows = uniform.reshape(-1, width)
        return normalize_rows(rows) / np.float32(np.sqrt(NUM_TABLES)) if sliced else rows

    def postprocess(
        self,
        vectors: NDArray[np.float32],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
    ) -> NDArray[np.generic]:
        normalize = self.default_normalize if normalize is None else normalize
        if dimensions is None and self._is_unit:
            normalize = False
        return postprocess(
            vectors, normalize=normalize, dimensions=dimensions, precision=precision, find_ranges=unit_ranges
        )


def _tokenized(index: int, text: str, num_words: int, truncated: bool) -> TokenizedText:
    return TokenizedText(np.frombuffer(_ids(index, text, num_words + _SPECIAL_TOKENS), np.int32), truncated)


def _ids(index: int, text: str, num_tokens: int) -> bytes:
    """The text's hash in the first two, zeros for the rest. Raises ModelOptionError naming text `index`."""
    try:
        digest = blake2b(text.encode(), digest_size=NUM_TABLES).digest()
    except UnicodeEncodeError as err:
        raise ModelOptionError(f"text {index} is not valid Unicode: {err.reason}") from err
    return digest + _PADDING_IDS[: 4 * (num_tokens - _SPECIAL_TOKENS)]
