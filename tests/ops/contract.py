"""The metrics that operators were promised, by the names of their samples. Knows names alone."""

from __future__ import annotations

#: Of a worker.
WORKER = frozenset(
    f"embedq_{name}"
    for name in [
        "jobs_total",
        "texts_total",
        "job_errors_total",
        "retries_total",
        "abandoned_jobs_total",
        "recovered_jobs_total",
        "tokens_total",
        "microbatches_total",
        "microbatch_texts_bucket",
        "microbatch_texts_count",
        "microbatch_texts_sum",
        "microbatch_tokens_bucket",
        "microbatch_tokens_count",
        "microbatch_tokens_sum",
        "microbatch_fill_ratio_bucket",
        "microbatch_fill_ratio_count",
        "microbatch_fill_ratio_sum",
        "padding_ratio_bucket",
        "padding_ratio_count",
        "padding_ratio_sum",
        "stage_seconds_bucket",
        "stage_seconds_count",
        "stage_seconds_sum",
        "device_seconds_total",
        "device_idle_ratio",
        "prefetched_jobs",
        "prefetched_tokens",
        "held_jobs",
        "oom_splits_total",
        "float32_fallbacks_total",
        "lease_renewals_total",
        "lease_renewals_late_total",
        "redis_round_trips_total",
        "redis_errors_total",
        "tokens_per_second",
        "model_info",
        "worker_info",
        "last_publish_timestamp_seconds",
        "live",
        "ready",
    ]
) | {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "python_info"}
#: Of the exporter.
EXPORTER = frozenset(
    f"embedq_{name}"
    for name in [
        "queue_jobs",
        "queue_texts",
        "queue_tokens",
        "queue_oldest_job_age_seconds",
        "queue_backlog_seconds",
        "fleet_workers",
        "fleet_tokens_per_second",
        "redis_up",
        "redis_used_memory_bytes",
        "redis_max_memory_bytes",
        "suspended",
    ]
)
#: Of the supervisor.
SUPERVISOR = frozenset({"embedq_supervisor_processes", "embedq_supervisor_restarts_total"})
#: Of those, on a GPU alone.
CUDA_ONLY = "embedq_gpu_memory_bytes"
#: Of those, what says the same from the beginning to the end.
QUIET = frozenset({"embedq_padding_ratio_sum", "process_open_fds", "python_info"})
