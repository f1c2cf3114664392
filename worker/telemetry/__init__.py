"""What others see of a worker: log lines, metrics, probes, its figures in Redis, spans.

The worker tells `observer` and `tracing` what happens, an event a micro-batch, publication or round; nothing in here
changes what becomes of a job.
"""
