"""Every Redis key that embedq reads or writes. No other Python module spells a key.

The Lua scripts compute keys from the ids they find; they are given PREFIX and use the names that stand here. The
names are RQ 3.0's (rq.job, rq.queue, rq.registry, rq.executions, rq.results, rq.worker); contract tests compare them
with the installed RQ. Knows names only, no connection.
"""

from __future__ import annotations

from rq.defaults import RQ_KEY_PREFIX

#: Put before every key: `rq`, or the environment's RQ_KEY_PREFIX, as RQ itself reads it.
PREFIX = RQ_KEY_PREFIX

#: Set of the keys of all queues that were ever used.
QUEUES = f"{PREFIX}:queues"
#: Set of the keys of all live workers.
WORKERS = f"{PREFIX}:workers"
#: Exists while `rq suspend` is in force.
SUSPENDED = f"{PREFIX}:suspended"

#: Set of the names of all groups.
GROUPS = f"{PREFIX}:groups"
#: Set of the names of all rate limits in use.
RATE_LIMITS = f"{PREFIX}:rl-keys"

#: What precedes a job's id in its key.
JOB_PREFIX = f"{PREFIX}:job:"


def queue(name: str) -> str:
    """List of the waiting job ids, head first."""
    return f"{PREFIX}:queue:{name}"


def queue_name(key: str) -> str:
    return key.removeprefix(f"{PREFIX}:queue:")


def job(job_id: str) -> str:
    """Hash of one job."""
    return JOB_PREFIX + job_id


def results(job_id: str) -> str:
    """Stream of a job's results, the latest last."""
    return f"{PREFIX}:results:{job_id}"


def staged_results(job_id: str, execution_id: str) -> str:
    """A result stream on its way to `results`; gone with the transaction that made it. Ours, RQ has no such key."""
    return f"{results(job_id)}:{execution_id}"


def dependents(job_id: str) -> str:
    """Set of the jobs that wait for this one."""
    return f"{JOB_PREFIX}{job_id}:dependents"


def dependencies(job_id: str) -> str:
    """Set of the jobs that this one waits for. The doubled colon is RQ's, here and not for the dependents."""
    return f"{JOB_PREFIX}:{job_id}:dependencies"


def executions(job_id: str) -> str:
    """Sorted set of a job's execution ids."""
    return f"{PREFIX}:executions:{job_id}"


def execution(job_id: str, execution_id: str) -> str:
    """Hash of one execution."""
    return f"{PREFIX}:execution:{job_id}:{execution_id}"


def started(queue_name: str) -> str:
    """Sorted set of `job:execution`, scored by the second at which the lease ends."""
    return f"{PREFIX}:wip:{queue_name}"


def finished(queue_name: str) -> str:
    return f"{PREFIX}:finished:{queue_name}"


def failed(queue_name: str) -> str:
    return f"{PREFIX}:failed:{queue_name}"


def canceled(queue_name: str) -> str:
    return f"{PREFIX}:canceled:{queue_name}"


def scheduled(queue_name: str) -> str:
    return f"{PREFIX}:scheduled:{queue_name}"


def deferred(queue_name: str) -> str:
    return f"{PREFIX}:deferred:{queue_name}"


def rate_limit(name: str) -> str:
    """Hash of one rate limit; the sorted sets of its jobs are this and `:allowed` or `:rate_limited`."""
    return f"{PREFIX}:rl:{name}"


def sequels(queue_name: str) -> str:
    """Sorted set of the jobs after whose end something is still to be done, by second; ours, RQ has no such key."""
    return f"{PREFIX}:embedq:sequels:{queue_name}"


def parked(queue_name: str) -> str:
    """Sorted set of the waiting jobs that only a newer worker can read, by wire version; ours, RQ has no such key."""
    return f"{PREFIX}:embedq:parked:{queue_name}"


def worker(name: str) -> str:
    """Hash of one worker."""
    return f"{PREFIX}:worker:{name}"


def worker_executions(name: str) -> str:
    """Set of the `job:execution` pairs that a worker holds."""
    return f"{PREFIX}:worker:{name}:executions"


def worker_channel(name: str) -> str:
    """Channel on which a worker is given commands."""
    return f"{PREFIX}:pubsub:{name}"


def cancel_channel(name: str) -> str:
    """Channel on which a worker is told the ids of jobs that were canceled; ours, and apart from the commands, so that
    whoever may cancel a job need not be trusted with `shutdown`."""
    return f"{PREFIX}:embedq:cancel:{name}"


def worker_claim(name: str) -> str:
    """The nonce of a worker's last claim; ours, RQ has no such key."""
    return f"{PREFIX}:worker:{name}:claim"


def group(name: str) -> str:
    """Set of the ids of a group's jobs."""
    return f"{PREFIX}:group:{name}"


def vector(content_hash: str) -> str:
    """The cached embedding of one text; ours, RQ has no such key."""
    return f"{PREFIX}:embedq:vector:{content_hash}"
