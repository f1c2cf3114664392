"""Whether a worker lives, and whether it can take jobs: what /livez and /readyz answer. Pure but for its clock.

Work in hand must move: be tokenized, encoded or published. A Redis that is away is no reason to restart a worker, which
waits for it; a device that does not answer is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from embedq.worker.claims import Outcome
from embedq.worker.telemetry.observer import Encoded, Observer

#: Of the time between two ticks so many seconds count at most: a process that stood still, stopped or suspended, has
#: not hung.
MAX_STEP_S = 2.0


class Health(Observer):
    """Attributes: phase; is_suspended (`rq suspend` is in force)."""

    def __init__(
        self, liveness_timeout_s: float, contact_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """contact_timeout_s: seconds without an answer of Redis' after which the worker is not ready."""
        self.phase: Literal["starting", "running", "stopping"] = "starting"
        self.is_suspended = False
        #: when Redis answered last, on the same clock; None until it does
        self.last_contact: Callable[[], float | None] = lambda: None
        #: names of threads that have ended and should not have
        self.dead_threads: Callable[[], Sequence[str]] = lambda: ()
        self._timeout_s = liveness_timeout_s
        self._contact_timeout_s = contact_timeout_s
        self._clock = clock
        self._has_moved = False
        self._stalled_s = 0.0
        self._ticked_at = clock()

    def begin(self) -> None:
        """The model is loaded and the worker registered, unless it is told to stop already."""
        if self.phase == "starting":
            self.phase = "running"

    def end(self) -> None:
        self.phase = "stopping"

    def tick(self, num_held: int) -> None:
        """To be called about once a second, with the number of jobs in hand."""
        now = self._clock()
        if self._has_moved or not num_held:
            self._has_moved = False
            self._stalled_s = 0.0
        else:
            self._stalled_s += min(now - self._ticked_at, MAX_STEP_S)
        self._ticked_at = now

    def why_not_live(self) -> str | None:
        """One line; None where all is well."""
        if dead := self.dead_threads():
            return f"threads have ended: {', '.join(dead)}"
        if self._stalled_s > self._timeout_s:
            return f"jobs in hand have not moved for {self._stalled_s:.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        if self.phase != "running":
            return self.phase
        if self.is_suspended:
            return "suspended"
        contact = self.last_contact()
        if contact is None:
            return "Redis has not answered yet"
        silent_s = self._clock() - contact
        if silent_s > self._contact_timeout_s:
            return f"Redis has not answered for {silent_s:.0f} s"
        return None

    # --- what counts as moving

    def tokenized(self, took_s: float) -> None:  # noqa: ARG002
        self._has_moved = True

    def encoded(self, batch: Encoded) -> None:  # noqa: ARG002
        self._has_moved = True

    def published(self, outcomes: Sequence[Outcome], took_s: float) -> None:  # noqa: ARG002
        self._has_moved = True

    def kept_waiting(self) -> None:
        self._has_moved = True
