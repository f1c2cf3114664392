"""How the commands and their processes end: every exit status and what it means. Knows no errors and no processes."""

from __future__ import annotations

import signal

EXIT_OTHER, EXIT_USAGE, EXIT_NO_JOB, EXIT_NO_RESULT, EXIT_REDIS, EXIT_MODEL = 1, 2, 3, 4, 5, 6
EXIT_DEVICE_LOST, EXIT_HANGS, EXIT_MODEL_LATER = 7, 8, 9
#: Of a worker, which waits for no job.
EXIT_GRACE_OVER = EXIT_NO_JOB
EXIT_INTERRUPTED = 128 + signal.SIGINT

MEANINGS: dict[int, str] = {
    0: "done",
    EXIT_OTHER: "the job failed or was canceled, or another error",
    EXIT_USAGE: "wrong usage: an option, a text, a URL or a setting that cannot work",
    EXIT_NO_JOB: "no such job, or it has expired; of a worker: its grace was too short",
    EXIT_NO_RESULT: "no result in time",
    EXIT_REDIS: "Redis cannot be reached, or refuses",
    EXIT_MODEL: "the model cannot be had, read or run",
    EXIT_DEVICE_LOST: "of a worker: its device is lost, a new process may get it back",
    EXIT_HANGS: "of a worker: a micro-batch did not end",
    EXIT_MODEL_LATER: "the model cannot be had at present: a network, a disk or memory; later it may",
    EXIT_INTERRUPTED: "interrupted",
}
#: Where a worker's own meaning differs.
_OF_WORKERS = {EXIT_OTHER: "an error", EXIT_GRACE_OVER: "its grace was too short"}


def worker_status(status: int) -> str:
    """Such as `status 7 (its device is lost, a new process may get it back)` or `SIGKILL`."""
    if status < 0:
        return signal_name(-status)
    if 128 < status < 128 + signal.NSIG and status != EXIT_INTERRUPTED:
        return f"status {status} ({signal_name(status - 128)})"
    meaning = _OF_WORKERS.get(status) or MEANINGS.get(status, "unknown")
    return f"status {status} ({meaning.removeprefix('of a worker: ')})"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
