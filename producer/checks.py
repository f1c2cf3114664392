"""Whether a single value can be what an option asks for, and how it is shown where it cannot. Knows no option."""

from __future__ import annotations

import re
from collections.abc import Iterable

from embedq.producer.errors import InvalidOptionError


def lone_surrogate(text: str) -> int | None:
    """Where a string is no Unicode: half a character, or a byte of a command line that was not UTF-8."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return err.start
    return None


def is_int(value: object, lowest: int, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def check_string(owner: object, name: str, max_chars: int) -> None:
    value = getattr(owner, name)
    if value is None:
        return
    check(isinstance(value, str), name, "a string", owner)
    if len(value) > max_chars:
        raise InvalidOptionError(f"{name} has {len(value):,} characters; at most {max_chars:,} go")
    if lone_surrogate(value) is not None:
        raise InvalidOptionError(f"{name} is not Unicode: it has a lone surrogate")


def shown(value: object) -> str:
    """A value in an error message: short, on one line. Text is shown if it is a name, and described otherwise.

    A worker's messages stand in Redis and in logs, where nobody's texts belong; what is nested is not even looked into.
    """
    if value is None or isinstance(value, (bool, int, float)):
        try:
            return ascii(str(value)[:60])
        except ValueError:  # a huge int refuses to become a string
            return f"a huge {type(value).__name__}"
    if isinstance(value, str):
        return repr(value) if _NAME.fullmatch(value) else f"a string of {len(value):,} characters"
    return f"a {type(value).__name__}"


#: What is a name rather than a text: of an option, a function, a model, a queue.
_NAME = re.compile(r"[\w./:-]{1,80}", re.ASCII)


def printable(text: str) -> str:
    """On one line, with nothing that steers a terminal or begins another line of a log."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


def check(fits: bool, name: str, wanted: str, owner: object) -> None:
    if not fits:
        raise InvalidOptionError(f"{name} must be {wanted}, not {shown(getattr(owner, name))}")
