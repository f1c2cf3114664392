"""`embedq exporter`: what all workers of one Redis share, as metrics for Prometheus: queues, backlog, fleet, Redis.

Each worker tells of itself; what is in Redis is told once, here, so that N workers don't count it N times. Looks when
it is scraped. Knows prometheus_client (the extra `metrics`); what is looked at is in `fleet`.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from wsgiref.simple_server import WSGIServer

import redis

from embedq.producer.connection import connect, describe
from embedq.producer.errors import ConfigurationError, EmbedqError
from embedq.producer.fleet import LOST, FleetInfo, FleetReader

try:
    from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as err:
    raise ConfigurationError(
        "prometheus_client is not installed, which the exporter needs: pip install 'embedq[metrics]'"
    ) from err

logger = logging.getLogger("embedq.exporter")

#: Seconds for which one look answers all scrapes.
FRESH_S = 1.0
#: Seconds for Redis to connect, and to answer: in all less than the 10 s that Prometheus waits for a scrape.
REDIS_TIMEOUT_S = 3.0
#: Seconds between attempts to reach a Redis that is not there at the start.
RETRY_S = 2.0
#: Statuses of jobs, as `fleet.QueueInfo` names them and as the metric does.
STATUSES = ("queued", "started", "scheduled", "deferred", "finished", "failed", "canceled", "parked")
#: States of workers; whatever else stands in a worker's hash counts as `other`.
STATES = ("started", "idle", "busy", "suspended", LOST, "other")


class FleetCollector(Collector):
    """Metrics of one Redis, looked at when they are asked for, but not more often than each FRESH_S."""

    def __init__(self, client: redis.Redis) -> None:
        self._reader = FleetReader(client)
        self._lock = threading.Lock()
        self._seen: FleetInfo | None = None
        self._look_s = 0.0
        self._looked_at = -FRESH_S
        self._is_failing = False

    def describe(self) -> list[Any]:
        """Nothing: else prometheus_client would look at Redis to learn the names."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            if time.monotonic() - self._looked_at >= FRESH_S:
                self._look()
            seen, look_s = self._seen, self._look_s
        yield _gauge("embedq_redis_up", "Whether Redis answered the last look (1) or not (0).", seen is not None)
        yield _gauge("embedq_look_seconds", "Time that the last look at Redis took.", look_s)
        if seen is not None:
            yield from _of_queues(seen)
            yield from _of_fleet(seen)
            yield from _of_server(seen)

    def _look(self) -> None:
        """Figures of a Redis that does not answer are not told again: they would look as if nothing changed."""
        began_at = time.monotonic()
        try:
            self._seen = self._reader.look()
            if self._is_failing:
                logger.info("Redis answers again")
            self._is_failing = False
        except EmbedqError as err:
            self._seen = None
            logger.log(logging.DEBUG if self._is_failing else logging.WARNING, "no metrics of Redis: %s", err)
            self._is_failing = True
        self._looked_at = time.monotonic()
        self._look_s = self._looked_at - began_at


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=float(value))


def _of_queues(seen: FleetInfo) -> Iterator[GaugeMetricFamily]:
    jobs = GaugeMetricFamily("embedq_queue_jobs", "Jobs of a queue by status.", labels=("queue", "status"))
    texts = GaugeMetricFamily("embedq_queue_texts", "Texts waiting, estimated on long queues.", labels=("queue",))
    tokens = GaugeMetricFamily("embedq_queue_tokens", "Tokens waiting, estimated.", labels=("queue",))
    age = GaugeMetricFamily("embedq_queue_oldest_job_age_seconds", "Age of the oldest waiting job.", labels=("queue",))
    backlog = GaugeMetricFamily(
        "embedq_queue_backlog_seconds", "Tokens waiting over the tokens/s of the queue's workers.", labels=("queue",)
    )
    rate = GaugeMetricFamily(
        "embedq_fleet_tokens_per_second", "What a queue's live workers are capable of.", labels=("queue",)
    )
    workers = GaugeMetricFamily("embedq_queue_workers", "Live workers of a queue.", labels=("queue",))
    for queue in seen.queues:
        for status in STATUSES:
            jobs.add_metric((queue.name, status), getattr(queue, status))
        texts.add_metric((queue.name,), queue.texts)
        tokens.add_metric((queue.name,), queue.tokens)
        if queue.oldest_age_s is not None:
            age.add_metric((queue.name,), queue.oldest_age_s)
        backlog.add_metric((queue.name,), queue.backlog_s)
        rate.add_metric((queue.name,), queue.tokens_per_s)
        workers.add_metric((queue.name,), queue.num_workers)
    yield from (jobs, texts, tokens, age, backlog, rate, workers)


def _of_fleet(seen: FleetInfo) -> Iterator[GaugeMetricFamily]:
    workers = GaugeMetricFamily("embedq_fleet_workers", "Workers by state.", labels=("state",))
    states = Counter(worker.state if worker.state in STATES else "other" for worker in seen.workers)
    for state in STATES:
        workers.add_metric((state,), states[state])
    yield workers
    yield _gauge("embedq_suspended", "Whether `rq suspend` is in force (1) or not (0).", seen.suspended)


def _of_server(seen: FleetInfo) -> Iterator[GaugeMetricFamily]:
    if seen.server is None:
        return
    used, most = seen.server.used_memory_bytes, seen.server.max_memory_bytes
    yield _gauge("embedq_redis_used_memory_bytes", "Memory that Redis uses.", used)
    yield _gauge("embedq_redis_max_memory_bytes", "Memory that Redis may use; 0: no limit.", most)


def run_exporter(url: str, host: str, port: int) -> None:
    """Serves until SIGTERM or Ctrl-C, from the first moment on: a Redis that is not there yet is waited for.

    Raises ConfigurationError for a URL, host or port that cannot be; QueueAccessError for credentials that Redis
    refuses at the start.
    """
    with _stop_signals() as stop, _connect(url) as client, serving(client, host, port) as bound_port:
        logger.info("metrics of Redis at %s on http://%s:%d/metrics", describe(client), host, bound_port)
        threading.Thread(target=_first_look, args=(url, stop), name="embedq-first-look", daemon=True).start()
        stop.wait()
    if stop.error is not None:
        raise stop.error


def _connect(url: str) -> redis.Redis:
    return connect(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S)


@contextmanager
def serving(client: redis.Redis, host: str, port: int) -> Iterator[int]:
    """Answers scrapes on threads of its own; yields the port, which is a free one for 0. Raises ConfigurationError."""
    registry = CollectorRegistry()
    registry.register(FleetCollector(client))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    server: WSGIServer
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as err:
        reason = getattr(err, "strerror", None) or err
        raise ConfigurationError(f"metrics cannot be served on {host}:{port}: {reason}") from err
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Stop(threading.Event):
    """Set when the exporter is to end, with the error if one is why."""

    error: EmbedqError | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()

    def handle(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_look(url: str, stop: _Stop) -> None:
    """Says at the start what scrapes would say later: that Redis is away, which passes, or that it wants other
    credentials, which ends the exporter. On a thread of its own, so that signals need not wait for Redis.
    """
    with _connect(url) as client:
        while not stop.is_set():
            try:
                FleetReader(client).look()
                return
            except EmbedqError as err:
                if not err.retryable:
                    stop.error = err
                    stop.set()
                    return
                logger.warning("waiting for Redis, next attempt in %g s: %s", RETRY_S, err)
            stop.wait(RETRY_S)
