"""Whether a single value can be what an option asks for, and how it is shown where it cannot. Knows no option."""

from __future__ import annotations

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
    """A value in an error message: short, on one line. (A huge int refuses to become a string.)"""
    try:
        return ascii(str(value)[:60])
    except ValueError:
        return f"a huge {type(value).__name__}"


def one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


def check(fits: bool, name: str, wanted: str, owner: object) -> None:
    if not fits:
        raise InvalidOptionError(f"{name} must be {wanted}, not {shown(getattr(owner, name))}")
