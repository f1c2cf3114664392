"""What an exercise found: rows of a table, each with what it must be. Knows no exercise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    found: str
    #: what it must be, for people; empty where anything goes
    wanted: str = ""
    is_good: bool = True


@dataclass(slots=True)
class Finding:
    """Of one exercise."""

    title: str
    #: one sentence each: what was done
    notes: Sequence[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def bad(self) -> list[Row]:
        return [row for row in self.rows if not row.is_good]

    def tell(self, what: str, found: object) -> None:
        """A figure that nothing depends on."""
        self.rows.append(Row(what, str(found)))

    def check(self, what: str, found: object, wanted: str, is_good: bool) -> None:
        self.rows.append(Row(what, str(found), wanted, is_good))

    def check_at_most(self, what: str, seconds: float, limit_s: float) -> None:
        self.check(what, f"{seconds:.2f} s", f"at most {limit_s:g} s", seconds <= limit_s)

    def check_none(self, what: str, found: Sequence[object]) -> None:
        shown = "0" if not found else f"{len(found)}, such as {', '.join(map(str, found[:3]))}"
        self.check(what, shown, "0", not found)
