"""What a caller may ask of an embedding, and of the job that carries it. Knows no Redis and no model.

What depends on the model (its dimensions, its prompts) is checked by the worker.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

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

#: Precisions that token output has.
TOKEN_PRECISIONS = ("float32", "float16")
#: Dimensions no model has, and tokens no window has.
MAX_DIMENSIONS = 1_000_000
MAX_CHUNK_OVERLAP = 1_000_000
#: Characters of what dashboards show.
MAX_DESCRIPTION_CHARS = 1_000
#: Ten years: the longest time to live, in seconds.
MAX_TTL_S = 10 * 365 * 24 * 3600
MAX_RETRIES = 1_000

#: Seconds a result is kept.
RESULT_TTL_S = 3600
#: Seconds a failed or canceled job is kept.
FAILURE_TTL_S = 7 * 24 * 3600
#: Attempts after the first one.
RETRIES = 3

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


class EnqueueKeywords(EmbedOptionFields, total=False):
    """What `enqueue` takes beside the texts: `EmbedOptions` and `JobSettings` as keyword arguments."""

    result_ttl: int
    failure_ttl: int
    ttl: int | None
    retries: int
    at_front: bool
    description: str | None


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
            _check_string(self, name, MAX_OPTION_CHARS)
        _check(self.normalize is None or isinstance(self.normalize, bool), "normalize", "true or false", self)
        _check(isinstance(self.truncate, bool), "truncate", "true or false", self)
        wanted = f"a whole number from 1 to {MAX_DIMENSIONS}"
        _check(self.dimensions is None or _is_int(self.dimensions, 1, MAX_DIMENSIONS), "dimensions", wanted, self)
        _check(self.precision in get_args(Precision), "precision", _one_of(get_args(Precision)), self)
        sides, outputs = get_args(TruncationSide), get_args(Output)
        _check(self.truncation_side in sides, "truncation_side", _one_of(sides), self)
        _check(self.output in outputs, "output", _one_of(outputs), self)
        _check(isinstance(self.chunk, bool), "chunk", "true or false", self)
        wanted = f"a whole number from 0 to {MAX_CHUNK_OVERLAP}"
        fits = self.chunk_overlap is None or _is_int(self.chunk_overlap, 0, MAX_CHUNK_OVERLAP)
        _check(fits, "chunk_overlap", wanted, self)
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
            _check(
                self.precision in TOKEN_PRECISIONS, "precision", f"{_one_of(TOKEN_PRECISIONS)} for output tokens", self
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> EmbedOptions:
        """Raises InvalidOptionError for an unknown name, with the nearest known one."""
        for name in options:
            if name not in OPTION_NAMES:
                raise InvalidOptionError(_unknown(name))
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        """Only what differs from the defaults: what goes over the wire."""
        return {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}


#: The names that `EmbedOptions` takes, in its order.
OPTION_NAMES: tuple[str, ...] = tuple(field.name for field in fields(EmbedOptions))
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(EmbedOptions)}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """How a job is kept; raises InvalidOptionError. Times in seconds, -1 keeps for good."""

    result_ttl: int = RESULT_TTL_S
    failure_ttl: int = FAILURE_TTL_S
    #: seconds the job may wait in the queue before it vanishes; None: for good
    ttl: int | None = None
    retries: int = RETRIES
    #: at the head of the queue
    at_front: bool = False
    #: what `rq info` and dashboards show; never the text itself unless the caller says so
    description: str | None = None

    def __post_init__(self) -> None:
        bounds = {"result_ttl": (-1, MAX_TTL_S), "failure_ttl": (-1, MAX_TTL_S), "retries": (0, MAX_RETRIES)}
        if self.ttl is not None:
            bounds["ttl"] = (1, MAX_TTL_S)
        for name, (lowest, highest) in bounds.items():
            fits = _is_int(getattr(self, name), lowest, highest)
            _check(fits, name, f"a whole number from {lowest} to {highest}", self)
        _check(isinstance(self.at_front, bool), "at_front", "true or false", self)
        _check_string(self, "description", MAX_DESCRIPTION_CHARS)


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
    for index, text in enumerate(checked):
        check_text(text, index)
    if (total := sum(map(len, checked))) > MAX_JOB_CHARS:
        raise InvalidTextError(f"the texts of one job have {total:,} characters; at most {MAX_JOB_CHARS:,} go")
    return checked


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


def lone_surrogate(text: str) -> int | None:
    """Where a string is no Unicode: half a character, or a byte of a command line that was not UTF-8."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return err.start
    return None


def check_job_id(job_id: object) -> str:
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise InvalidJobIdError(f"job id {shown(job_id)} does not do: 1 to 256 letters, digits, underscores and dashes")
    return job_id


def split_keywords(keywords: Mapping[str, Any]) -> tuple[EmbedOptions, JobSettings]:
    """The keyword arguments of `enqueue` sorted into the two kinds. Raises InvalidOptionError."""
    settings = {name: value for name, value in keywords.items() if name in _SETTING_NAMES}
    options = {name: value for name, value in keywords.items() if name not in _SETTING_NAMES}
    return EmbedOptions.from_mapping(options), JobSettings(**settings)


_SETTING_NAMES: Sequence[str] = tuple(field.name for field in fields(JobSettings))


def _is_int(value: object, lowest: int, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _check_string(owner: object, name: str, max_chars: int) -> None:
    value = getattr(owner, name)
    if value is None:
        return
    _check(isinstance(value, str), name, "a string", owner)
    if len(value) > max_chars:
        raise InvalidOptionError(f"{name} has {len(value):,} characters; at most {max_chars:,} go")
    if lone_surrogate(value) is not None:
        raise InvalidOptionError(f"{name} is not Unicode: it has a lone surrogate")


def shown(value: object) -> str:
    """A value in an error message: short, on one line. (A huge int refuses to become a string.)"""
    try:
        return ascii(str(value)[:60])
    except ValueError:
        return f"a huge {type(value).__name__}"


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


def _check(fits: bool, name: str, wanted: str, owner: object) -> None:
    if not fits:
        raise InvalidOptionError(f"{name} must be {wanted}, not {shown(getattr(owner, name))}")


def _unknown(name: str) -> str:
    known = (*OPTION_NAMES, *_SETTING_NAMES)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(known)
    return f"unknown option {name!r}; {hint}"
