"""What a caller may ask of an embedding, and the texts of a job. Knows no Redis and no model.

What depends on the model (its dimensions, its prompts) is checked by the worker.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from embedq.producer.checks import check, check_string, is_int, lone_surrogate, one_of, shown
from embedq.producer.errors import InvalidJobIdError, InvalidOptionError, InvalidTextError

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
TruncationSide = Literal["right", "left"]
#: One vector a text, or the last hidden state of every token.
Output = Literal["sentence", "tokens"]

#: Texts one job may carry.
MAX_TEXTS_PER_JOB = 1024
#: Characters one text may have; what counts to a model is its first few thousand.
MAX_TEXT_CHARS = 1_000_000
#: Characters the texts of one job may have together.
MAX_JOB_CHARS = 16_000_000
#: Characters of an option that is text: a prompt, a model's name.
MAX_OPTION_CHARS = 10_000

#: Characters of an unknown option's name that are compared with those of the known ones.
MAX_NAME_CHARS = 80

#: Precisions that token output has.
TOKEN_PRECISIONS = ("float32", "float16")
#: Dimensions no model has, and tokens no window has.
MAX_DIMENSIONS = 1_000_000
MAX_CHUNK_OVERLAP = 1_000_000

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")


class EmbedOptionFields(TypedDict, total=False):
    """`EmbedOptions` as keyword arguments."""

    prompt: str | None
    prompt_name: str | None
    normalize: bool | None
    dimensions: int | None
    precision: Precision
    truncate: bool
    truncation_side: TruncationSide
    chunk: bool
    chunk_overlap: int | None
    output: Output
    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """How texts become vectors. Raises InvalidOptionError on a value that no model could honour."""

    #: put before each text
    prompt: str | None = None
    #: the name of one of the model's own prompts; not together with `prompt`
    prompt_name: str | None = None
    #: to unit length; None: as the model says
    normalize: bool | None = None
    #: keep the first so many dimensions; unit vectors are made unit length again
    dimensions: int | None = None
    #: int8 and uint8 are steps of the model's calibrated ranges, beyond which they are clamped
    precision: Precision = "float32"
    #: cut a text to the model's length; false makes an over-long text an error
    truncate: bool = True
    #: the side that is cut off
    truncation_side: TruncationSide = "right"
    #: instead, split a text that is longer than the model into overlapping windows; its vector is their mean
    chunk: bool = False
    #: tokens that neighbouring windows share at least; None: an eighth of a window
    chunk_overlap: int | None = None
    #: `tokens`: the last hidden state of every token, special ones included, of unit length only if `normalize`
    output: Output = "sentence"
    #: the model that the caller expects; a worker that serves another fails the job
    model: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "prompt_name", "model"):
            check_string(self, name, MAX_OPTION_CHARS)
        check(self.normalize is None or isinstance(self.normalize, bool), "normalize", "true or false", self)
        check(isinstance(self.truncate, bool), "truncate", "true or false", self)
        wanted = f"a whole number from 1 to {MAX_DIMENSIONS}"
        check(self.dimensions is None or is_int(self.dimensions, 1, MAX_DIMENSIONS), "dimensions", wanted, self)
        check(self.precision in get_args(Precision), "precision", one_of(get_args(Precision)), self)
        sides, outputs = get_args(TruncationSide), get_args(Output)
        check(self.truncation_side in sides, "truncation_side", one_of(sides), self)
        check(self.output in outputs, "output", one_of(outputs), self)
        check(isinstance(self.chunk, bool), "chunk", "true or false", self)
        wanted = f"a whole number from 0 to {MAX_CHUNK_OVERLAP}"
        fits = self.chunk_overlap is None or is_int(self.chunk_overlap, 0, MAX_CHUNK_OVERLAP)
        check(fits, "chunk_overlap", wanted, self)
        self._check_together()

    def _check_together(self) -> None:
        """What contradicts itself."""
        if self.prompt is not None and self.prompt_name is not None:
            raise InvalidOptionError("prompt and prompt_name exclude each other; give one of them")
        if self.chunk_overlap is not None and not self.chunk:
            raise InvalidOptionError("chunk_overlap needs chunk; give both or neither")
        if self.output == "tokens":
            if self.chunk:
                raise InvalidOptionError(
                    "output tokens and chunk exclude each other: a token has one vector, in one window"
                )
            check(
                self.precision in TOKEN_PRECISIONS, "precision", f"{one_of(TOKEN_PRECISIONS)} for output tokens", self
            )

    def is_by_model(self, name: str) -> bool:
        """Whether the model of that full name is the expected one, which may be named by what follows a `/`."""
        return self.model is None or name == self.model or name.endswith(f"/{self.model}")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> EmbedOptions:
        """Raises InvalidOptionError for an unknown name, with the nearest known one."""
        for name in options:
            if name not in OPTION_NAMES:
                raise unknown_option(name, OPTION_NAMES)
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        """Only what differs from the defaults: what goes over the wire."""
        return {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}


#: The names that `EmbedOptions` takes, in its order.
OPTION_NAMES: tuple[str, ...] = tuple(field.name for field in fields(EmbedOptions))
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(EmbedOptions)}


def check_texts(texts: object) -> list[str]:
    """The texts of one job as a list. Raises InvalidTextError: none, too many, not a string, too long."""
    # A dict's or a set's order is not what anybody means by the rows of the result.
    if isinstance(texts, (bytes, bytearray, Mapping, Set)) or not isinstance(texts, Iterable):
        raise InvalidTextError(f"texts must be a string or a list of strings, not {type(texts).__name__}")
    checked = [texts] if isinstance(texts, str) else list(texts)
    if not checked:
        raise InvalidTextError("there is nothing to embed: the list of texts is empty")
    if len(checked) > MAX_TEXTS_PER_JOB:
        raise InvalidTextError(
            f"{len(checked):,} texts in one job; at most {MAX_TEXTS_PER_JOB:,} go, use enqueue_many or embed for more"
        )
    if not _are_plain(checked):
        for index, text in enumerate(checked):
            check_text(text, index)
    if (total := sum(map(len, checked))) > MAX_JOB_CHARS:
        raise InvalidTextError(f"the texts of one job have {total:,} characters; at most {MAX_JOB_CHARS:,} go")
    return checked


def _are_plain(texts: list[Any]) -> bool:
    """Whether one look at all of them shows that nothing is wrong: ASCII, none too long."""
    return set(map(type, texts)) == {str} and max(map(len, texts)) <= MAX_TEXT_CHARS and "".join(texts).isascii()


def check_text(text: object, index: int) -> str:
    """The text. Raises InvalidTextError if it cannot be one of a job."""
    if not isinstance(text, str):
        raise InvalidTextError(f"text {index} is {type(text).__name__}, not a string", index)
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidTextError(
            f"text {index} has {len(text):,} characters; at most {MAX_TEXT_CHARS:,} go, split it first", index
        )
    if (place := lone_surrogate(text)) is not None:
        raise InvalidTextError(f"text {index} has a lone surrogate at {place}; it is not Unicode", index)
    return text


def is_job_id(value: object) -> bool:
    return isinstance(value, str) and _JOB_ID.fullmatch(value) is not None


def check_job_id(job_id: object) -> str:
    if not isinstance(job_id, str) or not is_job_id(job_id):
        # The caller's own, and no text: shown whatever it is.
        shown_id = ascii(job_id[:60]) if isinstance(job_id, str) else shown(job_id)
        raise InvalidJobIdError(f"job id {shown_id} does not do: 1 to 256 letters, digits, underscores and dashes")
    return job_id


def unknown_option(name: str, known: Iterable[str]) -> InvalidOptionError:
    names = tuple(known)
    near = difflib.get_close_matches(name[:MAX_NAME_CHARS], names, n=1)
    hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(names)
    return InvalidOptionError(f"unknown option {shown(name)}; {hint}")
