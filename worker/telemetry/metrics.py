"""What Prometheus scrapes of a worker: every metric, its help and its buckets, and how the work that goes by moves it.

One registry a worker. Knows prometheus_client, which is an extra; what the worker knows anyway it asks for at a scrape.
Called once a micro-batch, a publication or a round. No text, id or secret becomes a label.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, get_args

import numpy as np
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from embedq.model import Encoder
from embedq.worker.claims import Became, Claim, Outcome, Recovered
from embedq.worker.telemetry.observer import Encoded, Observer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288, 16384)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
RATIOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
STAGES = ("queue", "tokenize", "plan", "encode", "publish")
#: Error codes that are counted from 0, so that the first one shows as a change; and those that are tried again.
USUAL_CODES = ("encode_failed", "out_of_memory", "non_finite", "internal", "bad_payload", "wrong_model")
USUAL_RETRIES = ("encode_failed", "out_of_memory", "internal")
OUTCOMES = (*(became for became in get_args(Became) if became), "released")


class Worker(Protocol):
    """What is asked of a worker at a scrape."""

    def device_seconds(self) -> Mapping[str, float]:
        """By state: encoding, starved, idle."""

    def idle_ratio(self) -> float: ...

    def tokens_per_s(self) -> float: ...

    def num_held(self) -> int: ...

    def prefetched_jobs(self) -> int: ...

    def prefetched_tokens(self) -> int: ...

    def oom_splits(self) -> int: ...

    def float32_fallbacks(self) -> int: ...

    def device_memory(self) -> Mapping[str, int]:
        """Bytes by kind; empty where the device has none of its own."""

    def round_trips(self) -> int: ...

    def redis_errors(self) -> Mapping[str, int]:
        """By class."""

    def is_live(self) -> bool: ...

    def is_ready(self) -> bool: ...


class Metrics(Observer):
    """All metrics of one worker. Attributes: registry."""

    def __init__(self, queues: Sequence[str], worker: Worker, info: Mapping[str, str]) -> None:
        """info: labels of embedq_worker_info."""
        # Each counter would have a second series with the time at which it was made.
        disable_created: Any = prometheus_client.disable_created_metrics
        disable_created()
        self.registry = registry = CollectorRegistry()
        self._encoder: Encoder | None = None
        self._max_batch_tokens = 1
        self._count_work(registry, queues)
        self._measure_batches(registry)
        Info("embedq_worker", "This worker.", registry=registry).info(dict(info))
        registry.register(_AtScrape(worker))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def _count_work(self, registry: CollectorRegistry, queues: Sequence[str]) -> None:
        by_outcome = ("queue", "outcome")
        self.jobs = Counter("embedq_jobs_total", "Jobs by what became of them here.", by_outcome, registry=registry)
        self.texts = Counter("embedq_texts_total", "Texts of these jobs.", by_outcome, registry=registry)
        self.errors = Counter(
            "embedq_job_errors_total",
            "Failed attempts by error code, whether they are tried again or not.",
            ("queue", "code"),
            registry=registry,
        )
        self.retries = Counter(
            "embedq_retries_total", "Jobs put back for another attempt.", ("queue", "code"), registry=registry
        )
        self.abandoned = Counter(
            "embedq_abandoned_jobs_total",
            "Jobs of dead workers that this one found, and that had no attempt left.",
            ("queue",),
            registry=registry,
        )
        self.recovered_jobs = Counter(
            "embedq_recovered_jobs_total",
            "Jobs of dead workers that this one gave back to their queue.",
            ("queue",),
            registry=registry,
        )
        self.renewals = Counter("embedq_lease_renewals_total", "Renewals of the leases.", registry=registry)
        self.late_renewals = Counter(
            "embedq_lease_renewals_late_total",
            "Renewals that came more than a quarter later than they should.",
            registry=registry,
        )
        self.last_publish = Gauge(
            "embedq_last_publish_timestamp_seconds", "When results were published last.", registry=registry
        )
        for queue in queues:
            for outcome in OUTCOMES:
                self.jobs.labels(queue, outcome)
                self.texts.labels(queue, outcome)
            for code in USUAL_CODES:
                self.errors.labels(queue, code)
            for code in USUAL_RETRIES:
                self.retries.labels(queue, code)
            self.abandoned.labels(queue)
            self.recovered_jobs.labels(queue)

    def _measure_batches(self, registry: CollectorRegistry) -> None:
        self.tokens = Counter("embedq_tokens_total", "Tokens encoded.", registry=registry)
        self.batches = Counter("embedq_microbatches_total", "Micro-batches encoded.", registry=registry)
        self.batch_texts = Histogram(
            "embedq_microbatch_texts", "Texts of a micro-batch.", buckets=TEXTS, registry=registry
        )
        self.batch_tokens = Histogram(
            "embedq_microbatch_tokens", "Tokens of a micro-batch.", buckets=TOKENS, registry=registry
        )
        self.fill = Histogram(
            "embedq_microbatch_fill_ratio",
            "Tokens of a micro-batch over max_batch_tokens.",
            buckets=RATIOS,
            registry=registry,
        )
        self.padding = Histogram(
            "embedq_padding_ratio",
            "Of a micro-batch's attention, the share that is padding.",
            buckets=RATIOS,
            registry=registry,
        )
        self.stages = StageSeconds(
            "embedq_stage_seconds",
            "Of a job: queue (enqueueing to claim), plan (tokenized to device); of a call: tokenize, encode, publish.",
            SECONDS,
        )
        registry.register(self.stages)

    def serve(self, encoder: Encoder, device: str, dtype: str, max_batch_tokens: int) -> None:
        """Before the first micro-batch, which is this encoder's."""
        self._encoder, self._max_batch_tokens = encoder, max_batch_tokens
        Info("embedq_model", "The model that this worker serves.", registry=self.registry).info(
            {
                "model": encoder.name,
                "revision": encoder.revision,
                "device": device,
                "dtype": dtype,
                "max_batch_tokens": str(max_batch_tokens),
                "dimensions": str(encoder.embedding_dim),
            }
        )

    def exposed(self, accept: str) -> tuple[bytes, str]:
        """All of it as the Accept header asks, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    # --- what moves them

    def claimed(self, claims: Sequence[Claim]) -> None:
        self.stages.observe("queue", [claim.queued_s for claim in claims])

    def tokenized(self, took_s: float) -> None:
        self.stages.observe("tokenize", (took_s,))

    def encoded(self, batch: Encoded) -> None:
        self.tokens.inc(batch.num_tokens)
        self.batches.inc()
        self.batch_texts.observe(len(batch.pieces))
        self.batch_tokens.observe(batch.num_tokens)
        self.fill.observe(batch.num_tokens / self._max_batch_tokens)
        self.stages.observe("encode", (batch.took_s,))
        begun = [work for work in batch.works if not work.batch_texts]
        if begun:
            self.stages.observe("plan", [batch.began_at - work.began_at for work in begun])
        if self._encoder is not None:
            self.padding.observe(self._encoder.padding_ratio([work.tokens[place] for work, place in batch.pieces]))

    def published(self, outcomes: Sequence[Outcome], took_s: float) -> None:
        texts: Tally[tuple[str, str]] = Tally()
        jobs: Tally[tuple[str, str]] = Tally()
        for outcome in outcomes:
            # A job that turned out to be canceled is told of by itself.
            if outcome.became not in ("", "canceled"):
                key = outcome.claim.queue, outcome.became
                jobs[key] += 1
                texts[key] += outcome.claim.num_texts
        for labels, number in jobs.items():
            self._count(labels, number, texts[labels])
        for outcome in outcomes:
            if outcome.became == "failed" or outcome.became == "retried":
                self._count_error(outcome)
        self.stages.observe("publish", (took_s,))
        self.last_publish.set(time.time())

    def canceled(self, claims: Sequence[Claim]) -> None:
        self._count_claims(claims, "canceled")

    def released(self, claims: Sequence[Claim]) -> None:
        self._count_claims(claims, "released")

    def stopped(self, claim: Claim, code: str) -> None:
        self._count_claims([claim], "failed")
        self.errors.labels(claim.queue, code).inc()

    def recovered(self, queue: str, recovered: Recovered) -> None:
        if recovered.taken:
            self.recovered_jobs.labels(queue).inc(recovered.retried)
            self.abandoned.labels(queue).inc(recovered.failed)

    def renewed(self, *, is_late: bool) -> None:
        self.renewals.inc()
        if is_late:
            self.late_renewals.inc()

    def _count_claims(self, claims: Sequence[Claim], outcome: str) -> None:
        for claim in claims:
            self._count((claim.queue, outcome), 1, claim.num_texts)

    def _count(self, labels: tuple[str, str], num_jobs: int, num_texts: int) -> None:
        self.jobs.labels(*labels).inc(num_jobs)
        self.texts.labels(*labels).inc(num_texts)

    def _count_error(self, outcome: Outcome) -> None:
        self.errors.labels(outcome.claim.queue, outcome.code).inc()
        if outcome.became == "retried":
            self.retries.labels(outcome.claim.queue, outcome.code).inc()


class StageSeconds(Collector):
    """A histogram by stage that takes many values at once: some are of each job, which has no time for a call each."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name, self._help = name, help_text
        self._bounds = np.array(bounds)
        self._labels = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        self._lock = threading.Lock()
        self._counts = {stage: np.zeros(len(bounds) + 1, np.int64) for stage in STAGES}
        self._sums = dict.fromkeys(STAGES, 0.0)

    def observe(self, stage: str, seconds: Sequence[float]) -> None:
        values = np.array(seconds)
        # A bucket has what is up to its bound.
        counts = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._bounds) + 1)
        with self._lock:
            self._counts[stage] += counts
            self._sums[stage] += float(values.sum())

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=("stage",))
        with self._lock:
            for stage in STAGES:
                up_to = np.cumsum(self._counts[stage]).tolist()
                buckets: Any = list(zip(self._labels, up_to, strict=True))
                family.add_metric((stage,), buckets, self._sums[stage])
        yield family


class _AtScrape(Collector):
    """What the worker knows itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def describe(self) -> list[Metric]:
        """Nothing is asked of the worker before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        yield _labelled(
            CounterMetricFamily,
            "embedq_device_seconds",
            "Of the encoder's thread: encoding, starved while there was work, or idle.",
            "state",
            worker.device_seconds(),
        )
        yield _labelled(
            CounterMetricFamily,
            "embedq_redis_errors",
            "Errors of calls to Redis, by class.",
            "error",
            worker.redis_errors(),
        )
        counters: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("embedq_redis_round_trips", "Times that Redis was sent something after an answer.", worker.round_trips),
            ("embedq_oom_splits", "Micro-batches halved because memory ran out.", worker.oom_splits),
            (
                "embedq_float32_fallbacks",
                "Texts encoded in float32 because they were not finite.",
                worker.float32_fallbacks,
            ),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(name, text, value=value())
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            (
                "embedq_device_idle_ratio",
                "Of the last minute, the share in which nothing was encoded.",
                worker.idle_ratio,
            ),
            (
                "embedq_prefetched_jobs",
                "Jobs with texts that are not on the device yet.",
                worker.prefetched_jobs,
            ),
            ("embedq_prefetched_tokens", "Tokens claimed and not on the device yet.", worker.prefetched_tokens),
            ("embedq_held_jobs", "Jobs in hand.", worker.num_held),
            ("embedq_tokens_per_second", "Tokens a second while encoding, lately.", worker.tokens_per_s),
            ("embedq_live", "Whether /livez is green.", worker.is_live),
            ("embedq_ready", "Whether /readyz is green.", worker.is_ready),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value())
        if memory := worker.device_memory():
            yield _labelled(GaugeMetricFamily, "embedq_gpu_memory_bytes", "The GPU's memory.", "kind", memory)


def _labelled(family: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    found: Metric = family(name, text, labels=(label,))
    for value in values:
        found.add_metric((value,), values[value])  # type: ignore[attr-defined]
    return found
