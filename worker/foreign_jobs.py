"""RQ's jobs as a worker of ours reads them: within bounds, whatever somebody wrote into their hashes.

RQ reads a hash whole and inflates it without a limit; nothing here does. What opens URLs is left out. Knows RQ's `Job`
and the fields that it restores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import redis
from rq.exceptions import NoSuchJobError
from rq.job import Job

from embedq.producer import keys, scripts, wire
from embedq.producer.errors import WireError

#: Bytes of one field, but `data`; what is longer counts as not there.
MAX_FIELD_BYTES = 64 * 1024
#: Jobs read in one call of the script.
READ_JOBS = 100
#: What `Job.restore` reads beside `data`, but for `webhooks` (URLs that a worker would open), `result` and `exc_info`.
FIELDS = (
    *("created_at", "origin", "worker_name", "description", "enqueued_at", "started_at", "ended_at", "last_heartbeat"),
    *("group_id", "timeout", "result_ttl", "failure_ttl", "status", "ttl", "meta"),
    *("success_callback_name", "success_callback_timeout", "failure_callback_name", "failure_callback_timeout"),
    *("stopped_callback_name", "stopped_callback_timeout"),
    *("dependency_ids", "dependency_id", "allow_dependency_failures", "enqueue_at_front"),
    *("number_of_retries", "retries_left", "retry_intervals", "enqueue_at_front_on_retry"),
    *("repeats_left", "repeat_intervals", "rate_limit_key", "rate_limit_concurrency"),
)


class ForeignJob(Job):
    """Raises what RQ's own raises for a hash that it cannot read."""

    def refresh(self) -> None:
        [fields] = _read([self.id], self.connection, wire.MAX_DATA_BYTES)
        if fields is None:
            raise NoSuchJobError(f"No such job: {self.key!r}")
        self.restore(fields)

    @classmethod
    def fetch_many(cls, job_ids: Iterable[str], connection: redis.Redis, serializer: Any = None) -> list[Job | None]:
        """Without their `data`: RQ asks for many where it looks at their states alone."""
        jobs: list[Job | None] = []
        ids = list(job_ids)
        for start in range(0, len(ids), READ_JOBS):
            some = ids[start : start + READ_JOBS]
            for job_id, fields in zip(some, _read(some, connection, 0), strict=True):
                job = None if fields is None else cls(job_id, connection=connection, serializer=serializer)
                if job is not None and fields is not None:
                    job.restore(fields)
                jobs.append(job)
        return jobs

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        try:
            data = wire.inflate(raw_data.get(b"data", b""), wire.MAX_REQUEST_BYTES)
        except WireError:
            data = b""  # the job has failed by it already
        super().restore({**raw_data, b"data": data})

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What RQ writes back when it moves a job: not its `data`, which may not have been read."""
        fields: dict[str, Any] = super().to_dict(*args, **kwargs)
        del fields["data"]
        return fields


def _read(job_ids: list[str], client: redis.Redis, max_data_bytes: int) -> list[dict[bytes, bytes] | None]:
    """The fields of these jobs; None for one that is not there."""
    script = scripts.load(client, __package__, "read_jobs")
    replies = script(keys=[keys.job(job_id) for job_id in job_ids], args=[MAX_FIELD_BYTES, max_data_bytes, *FIELDS])
    return [dict(zip(reply[::2], reply[1::2], strict=True)) if reply is not None else None for reply in replies]
