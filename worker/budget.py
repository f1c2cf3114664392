"""How many tokens at a time memory has room for: less after it ran out, then by and by as many as before. Pure.

Knows no device and no time: what went well since is the measure of whether to try more.
"""

from __future__ import annotations

#: So many times the limit must be encoded without running out of memory before the limit doubles. Each time that a
#: doubled one turns out to be too much, twice as many, up to the most.
PATIENCE, MAX_PATIENCE = 16, 1024


class MemoryBudget:
    """Attributes: full (tokens of a micro-batch where memory suffices), limit (1 to `full`, what it may have now)."""

    def __init__(self, full: int) -> None:
        self.full = full
        self.limit = full
        self._patience = PATIENCE
        #: tokens that went well since the limit changed
        self._num_tokens = 0
        self._has_risen = False
        #: before it shrank for the first time since it last rose
        self._before: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.limit == self.full

    def shrink(self, num_tokens: int) -> None:
        """Memory ran out for several texts of so many tokens in all."""
        if self._before is None:
            self._before = self.limit
        if self._has_risen:
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        self._set(max(1, min(self.limit, num_tokens) // 2), has_risen=False)

    def succeeded(self, num_tokens: int) -> None:
        """A micro-batch of so many tokens was encoded."""
        self._num_tokens += num_tokens
        if self._num_tokens < self._patience * self.limit:
            return
        self._before = None
        if self.is_whole:
            self._patience = PATIENCE
        self._set(min(2 * self.limit, self.full), has_risen=not self.is_whole)

    def forgive(self) -> None:
        """What memory ran out for was one text all alone: the others' limit is again what it was."""
        if self._before is not None:
            self._set(self._before, has_risen=self._has_risen)
            self._before = None

    def _set(self, limit: int, *, has_risen: bool) -> None:
        self.limit, self._has_risen, self._num_tokens = limit, has_risen, 0
