"""How a job is put on its queue and how long it is kept; nothing of this changes its vectors. Knows no Redis."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Protocol

from embedq.producer.checks import check, check_string, is_int, lone_surrogate, shown
from embedq.producer.errors import InvalidJobIdError, InvalidOptionError
from embedq.producer.options import OPTION_NAMES, EmbedOptionFields, EmbedOptions, check_job_id, unknown_option

#: Seconds a result is kept.
RESULT_TTL_S = 3600
#: Seconds a failed or canceled job is kept.
FAILURE_TTL_S = 7 * 24 * 3600
#: Attempts after the first one.
RETRIES = 3

#: Characters of what dashboards show.
MAX_DESCRIPTION_CHARS = 1_000
#: Ten years: the longest time to live, in seconds.
MAX_TTL_S = 10 * 365 * 24 * 3600
MAX_RETRIES = 1_000
#: Jobs one job may wait for.
MAX_DEPENDENCIES = 1_000
MAX_GROUP_CHARS = 256
MAX_DEPTH = 10**12

_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class HasId(Protocol):
    """A job's handle."""

    id: str


class EnqueueKeywords(EmbedOptionFields, total=False):
    """What `enqueue` takes beside the texts: `EmbedOptions` and `JobSettings` as keyword arguments."""

    result_ttl: int
    failure_ttl: int
    ttl: int | None
    retries: int
    retry_intervals: Iterable[int]
    at_front: bool
    description: str | None
    dedupe: bool
    group: str | None
    depends_on: str | HasId | Iterable[str | HasId]
    on_success: str | None
    on_failure: str | None
    max_depth: int | None
    block_timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """Raises InvalidOptionError, InvalidJobIdError. Times in seconds; a time to live of -1 keeps for good."""

    result_ttl: int = RESULT_TTL_S
    failure_ttl: int = FAILURE_TTL_S
    #: seconds the job may wait in the queue before it vanishes; None: for good
    ttl: int | None = None
    retries: int = RETRIES
    #: seconds before each retry; with fewer of them than retries, the first stands for the missing ones, as in RQ
    retry_intervals: tuple[int, ...] = ()
    #: at the head of the queue
    at_front: bool = False
    #: what `rq info` and dashboards show; never the text itself unless the caller says so
    description: str | None = None
    #: the job's id is the hash of its request: the same request on the same queue is the same job until it expires
    dedupe: bool = False
    #: the name of RQ's group that the job joins
    group: str | None = None
    #: ids of the jobs that must finish first; if one of them fails or is canceled, the job waits on
    depends_on: tuple[str, ...] = ()
    #: dotted name of a function that RQ calls after the job; a worker runs only what it was allowed to
    on_success: str | None = None
    on_failure: str | None = None
    #: refuse jobs beyond so many waiting (delayed and dependent ones included); None: no limit
    max_depth: int | None = None
    #: seconds to wait for room instead
    block_timeout: float = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "retry_intervals", _listed("retry_intervals", self.retry_intervals))
        object.__setattr__(self, "depends_on", job_ids_of(self.depends_on))
        bounds = {"result_ttl": (-1, MAX_TTL_S), "failure_ttl": (-1, MAX_TTL_S), "retries": (0, MAX_RETRIES)}
        if self.ttl is not None:
            bounds["ttl"] = (1, MAX_TTL_S)
        if self.max_depth is not None:
            bounds["max_depth"] = (1, MAX_DEPTH)
        for name, (lowest, highest) in bounds.items():
            fits = is_int(getattr(self, name), lowest, highest)
            check(fits, name, f"a whole number from {lowest} to {highest}", self)
        for name in ("at_front", "dedupe"):
            check(isinstance(getattr(self, name), bool), name, "true or false", self)
        check_string(self, "description", MAX_DESCRIPTION_CHARS)
        check(_is_seconds(self.block_timeout), "block_timeout", f"seconds from 0 to {MAX_TTL_S}", self)
        self._check_relations()

    def _check_relations(self) -> None:
        """What ties the job to others."""
        if self.group is not None:
            check_group(self.group)
        for name in ("on_success", "on_failure"):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, str) and _DOTTED_NAME.fullmatch(value) is not None)
            check(fits, name, "the dotted name of a function, package.module.function", self)
        fits = all(is_int(seconds, 0, MAX_TTL_S) for seconds in self.retry_intervals)
        check(fits, "retry_intervals", f"whole seconds from 0 to {MAX_TTL_S}", self)
        check(len(self.retry_intervals) <= MAX_RETRIES, "retry_intervals", f"at most {MAX_RETRIES} numbers", self)
        if len(self.depends_on) > MAX_DEPENDENCIES:
            raise InvalidOptionError(f"depends_on names {len(self.depends_on):,} jobs; at most {MAX_DEPENDENCIES:,} go")


_SETTING_NAMES: tuple[str, ...] = tuple(field.name for field in fields(JobSettings))


def split_keywords(keywords: Mapping[str, Any]) -> tuple[EmbedOptions, JobSettings]:
    """The keyword arguments of `enqueue` sorted into the two kinds. Raises InvalidOptionError, InvalidJobIdError.

    Callers repeat themselves, so what was checked once is remembered.
    """
    if "depends_on" in keywords:  # a handle holds its queue, which need not be remembered
        keywords = {**keywords, "depends_on": job_ids_of(keywords["depends_on"])}
    try:
        return _remembered(**keywords)
    except TypeError:  # a list cannot be remembered
        return _split(**keywords)


def _split(**keywords: Any) -> tuple[EmbedOptions, JobSettings]:
    settings = {name: value for name, value in keywords.items() if name in _SETTING_NAMES}
    options = {name: value for name, value in keywords.items() if name not in _SETTING_NAMES}
    for name in options:
        if name not in OPTION_NAMES:
            raise unknown_option(name, (*OPTION_NAMES, *_SETTING_NAMES))
    return EmbedOptions(**options), JobSettings(**settings)


#: Typed, so that true is not taken for 1.
_remembered = lru_cache(maxsize=256, typed=True)(_split)


def job_ids_of(jobs: object) -> tuple[str, ...]:
    """The ids of one job or several, given as ids or handles, each once. Raises InvalidJobIdError."""
    single = isinstance(jobs, str) or hasattr(jobs, "id")
    if not single and not isinstance(jobs, Iterable):
        raise InvalidJobIdError(f"{shown(jobs)} is neither a job id nor a list of them")
    entries: Iterable[Any] = [jobs] if single else jobs  # type: ignore[assignment]
    return tuple(dict.fromkeys(check_job_id(getattr(entry, "id", entry)) for entry in entries))


def check_group(name: object) -> str:
    """The name of a group. Raises InvalidOptionError."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_GROUP_CHARS or lone_surrogate(name) is not None:
        raise InvalidOptionError(f"group must be a name of 1 to {MAX_GROUP_CHARS} characters, not {shown(name)}")
    return name


def _listed(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidOptionError(f"{name} must be a list, not {shown(values)}")
    return tuple(values)


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_TTL_S
