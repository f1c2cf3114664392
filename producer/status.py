"""The states a job can be in: RQ's own names. Knows no Redis."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """RQ's job status; compares equal to its plain string."""

    CREATED = "created"
    QUEUED = "queued"
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELED = "canceled"
    STOPPED = "stopped"
    DEFERRED = "deferred"
    SCHEDULED = "scheduled"
    RATE_LIMITED = "rate_limited"
    READY_TO_ENQUEUE = "ready_to_enqueue"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing more will happen to the job unless somebody requeues it."""
        return self in _TERMINAL


_TERMINAL = frozenset({JobStatus.FINISHED, JobStatus.FAILED, JobStatus.CANCELED, JobStatus.STOPPED})
