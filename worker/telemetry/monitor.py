"""What others see of a worker while it runs: its figures in Redis, and over HTTP its probes and metrics.

Joins the parts of a worker with those that count (`figures`, `metrics`), judge (`health`) and serve (HTTP). Without
--metrics-port only the figures are kept, and prometheus_client is not imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import redis

from embedq.producer import keys, scripts, wire
from embedq.producer.errors import ConfigurationError
from embedq.producer.http_endpoints import Answer, HttpEndpoints, Page, inherited
from embedq.worker.chores import Chores
from embedq.worker.engine import Engine
from embedq.worker.estimates import ClaimBudget
from embedq.worker.leases import LeaseKeeper
from embedq.worker.pipeline import Pipeline
from embedq.worker.settings import WorkerSettings
from embedq.worker.telemetry.figures import Figures, to_json
from embedq.worker.telemetry.health import Health
from embedq.worker.telemetry.observer import Observer, Observers
from embedq.worker.telemetry.traffic import Traffic

if TYPE_CHECKING:
    from embedq.worker.telemetry.metrics import Metrics

logger = logging.getLogger("embedq.worker")

#: Seconds between two looks at what is to be told to Redis.
TELL_EVERY_S = 2.0


class Parts(NamedTuple):
    """Of a worker, once its model is loaded."""

    engine: Engine
    pipeline: Pipeline
    leases: LeaseKeeper
    chores: Chores
    budget: ClaimBudget


class Monitor:
    """One worker's, within a `with` block. Attributes: observer (to be told of the work), health."""

    def __init__(self, settings: WorkerSettings, name: str, queues: Sequence[str], client: redis.Redis) -> None:
        """Raises ConfigurationError where the port is taken, or prometheus_client is not installed. A worker that
        has a supervisor's socket and no port serves its probes without metrics.
        """
        self._client = client
        self._worker_key = keys.worker(name)
        self._write = scripts.load(client, "embedq.worker", "figures")
        self._parts: Parts | None = None
        self._traffic = Traffic()
        self._written: dict[str, Any] = {}
        self._next_telling = 0.0
        self.health = Health(settings.liveness_timeout_s, settings.lease_s)
        self._figures = Figures(self)
        self._metrics: Metrics | None = None
        self._endpoints: HttpEndpoints | None = None
        self.observer: Observer = self._figures
        if settings.metrics_port is not None:
            self._metrics = _make_metrics(queues, self, name)
            self.observer = Observers(self._figures, self._metrics, self.health)
        elif settings.metrics_fd is not None:
            self.observer = Observers(self._figures, self.health)
        if settings.metrics_port is not None or settings.metrics_fd is not None:
            self._endpoints = _endpoints(settings, self._pages())
            self.health.last_contact = lambda: self._traffic.last_contact

    def __enter__(self) -> Monitor:
        """Before anything is asked of Redis, which may take long to come."""
        if self._endpoints is not None:
            self._traffic.watch(self._client)
            self._endpoints.start()
            logger.info(
                "probes and metrics: http://%s:%d/livez, /readyz and /metrics",
                *(_in_url(self._endpoints.host), self._endpoints.port),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._endpoints is not None:
            self._endpoints.close()

    def attach(self, parts: Parts) -> None:
        """The model is loaded."""
        engine = parts.engine
        placed, _, dtype = engine.encoder.placement.partition(" ")
        dtype = dtype or "float32"  # the stand-in, which names none
        self._figures.serve(engine.max_batch_tokens, {"version": version(), "wire": wire.VERSION, "dtype": dtype})
        if self._metrics is not None:
            self._metrics.serve(engine.encoder, placed, dtype, engine.max_batch_tokens)
        self._parts = parts
        self.health.dead_threads = self._dead_threads

    @property
    def port(self) -> int | None:
        """On which it serves; None where it doesn't."""
        return None if self._endpoints is None else self._endpoints.port

    def tick(self) -> None:
        """Each second, on the thread of the leases."""
        self.health.tick(self.num_held())
        self._figures.sample()

    def tell(self) -> None:
        """Each second, on the thread of the chores: what is new, each TELL_EVERY_S. One round trip, or none where
        nothing is and nobody asks. Raises redis-py's errors.
        """
        now = time.monotonic()
        if now < self._next_telling:
            return
        self._next_telling = now + TELL_EVERY_S
        look = self._figures.look()
        is_new = look != self._written
        if not is_new and self._endpoints is None:
            return
        is_known, is_suspended = self._write(
            keys=[self._worker_key, keys.SUSPENDED], args=[to_json(look) if is_new else b""]
        )
        self.health.is_suspended = bool(is_suspended)
        # A worker that Redis has forgotten brings them along when it registers again.
        self._written = look if is_known else {}

    def fields(self) -> dict[str, bytes]:
        """Of the worker's hash, for its registration."""
        return {"embedq_figures": to_json(self._figures.look())}

    # --- what the figures and the metrics ask for

    def device_seconds(self) -> Mapping[str, float]:
        if self._parts is None:
            return {"encoding": 0.0, "starved": 0.0, "idle": 0.0}
        return dict(self._parts.pipeline.device_time.so_far().items())

    def encoding_s(self) -> float:
        return self.device_seconds()["encoding"]

    def idle_ratio(self) -> float:
        return self._figures.idle_ratio()

    def tokens_per_s(self) -> float:
        return self._figures.tokens_per_s

    def tokens_per_byte(self) -> float:
        return self._parts.budget.tokens_per_byte if self._parts else 0.0

    def num_held(self) -> int:
        return self._parts.leases.num_held if self._parts else 0

    def prefetched_jobs(self) -> int:
        return self._parts.pipeline.prefetched_jobs() if self._parts else 0

    def prefetched_tokens(self) -> int:
        return self._parts.pipeline.prefetched_tokens() if self._parts else 0

    def oom_splits(self) -> int:
        return self._parts.engine.isolation.oom_splits if self._parts else 0

    def float32_fallbacks(self) -> int:
        return self._parts.engine.isolation.num_in_float32 if self._parts else 0

    def device_memory(self) -> Mapping[str, int]:
        return self._parts.engine.encoder.device_memory() if self._parts else {}

    def round_trips(self) -> int:
        return self._traffic.round_trips

    def redis_errors(self) -> Mapping[str, int]:
        return dict(self._traffic.errors)

    def is_live(self) -> bool:
        return self.health.why_not_live() is None

    def is_ready(self) -> bool:
        return self.health.why_not_ready() is None

    def _dead_threads(self) -> list[str]:
        parts = self._parts
        if parts is None or self.health.phase != "running":
            return []
        dead = parts.pipeline.dead_threads()
        return dead + [
            name for name, part in (("leases", parts.leases), ("chores", parts.chores)) if not part.is_running
        ]

    # --- pages

    def _pages(self) -> dict[str, Page]:
        pages = {
            "/livez": Page(lambda _: _judged(self.health.why_not_live())),
            "/readyz": Page(lambda _: _judged(self.health.why_not_ready())),
        }
        if self._metrics is not None:
            # A GPU that hangs may not even say how much memory it has.
            pages["/metrics"] = Page(functools.partial(_expose, self._metrics), is_slow=True)
        return pages


def _expose(metrics: Metrics, accept: str) -> Answer:
    body, content_type = metrics.exposed(accept)
    return Answer(200, body, content_type)


def _endpoints(settings: WorkerSettings, pages: Mapping[str, Page]) -> HttpEndpoints:
    """On a supervisor's socket, or on a port of our own."""
    listening = None if settings.metrics_fd is None else inherited(settings.metrics_fd)
    return HttpEndpoints(settings.metrics_host, settings.metrics_port or 0, pages, listening)


def _make_metrics(queues: Sequence[str], monitor: Monitor, name: str) -> Metrics:
    try:
        from embedq.worker.telemetry.metrics import Metrics
    except ModuleNotFoundError as err:
        raise ConfigurationError(
            f"{err.name} is not installed, which --metrics-port needs: pip install 'embedq[metrics]'"
        ) from err
    return Metrics(queues, monitor, {"worker": name, "version": version(), "wire_version": str(wire.VERSION)})


def version() -> str:
    """embedq's."""
    return importlib.metadata.version("embedq")


def _judged(why_not: str | None) -> Answer:
    return Answer(200, b"ok\n") if why_not is None else Answer(503, f"{why_not}\n".encode())


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
