"""How a worker runs: every setting, its default and its environment variable. Knows no Redis and no model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from embedq.producer.errors import ConfigurationError

LogFormat = Literal["text", "json"]
#: RQ's: the first queue before the others, each in turn, or at random.
DequeueStrategyName = Literal["default", "round_robin", "random"]
DEFAULT_MODEL = "all-mpnet-base-v2"
#: What every setting's environment variable begins with: EMBEDQ_LEASE_S for `lease_s`.
ENVIRONMENT_PREFIX = "EMBEDQ_"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Raises ConfigurationError for a value out of range."""

    #: folder, hub id, or `noop:768` for a stand-in
    model: str = DEFAULT_MODEL
    #: the hub's branch, tag or commit; None: its main
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    #: threads of the CPU's kernels and of the tokenizer; None: one a core, within the control group's limit
    threads: int | None = None
    #: how attention is computed, and by whose kernels
    attention: str = "auto"
    kernels: str = "auto"
    #: file of ranges for int8 and uint8 vectors; None: the model's own, else what ships for it
    calibration: str | None = None
    #: tokens of one micro-batch; None: what the device is good for
    max_batch_tokens: int | None = None
    #: encode the largest micro-batches before the first job, to know that they fit; None: on cuda
    warm_up: bool | None = None
    #: on cuda, float32 products with 10 bits of mantissa
    allow_tf32: bool = False
    #: seconds for which a claimed job is this worker's without a sign of life
    lease_s: float = 60.0
    #: seconds from SIGTERM to the end
    grace_s: float = 25.0
    #: seconds for which a worker that starts waits for Redis; None: for good, 0: not at all
    startup_timeout_s: float | None = None
    #: seconds that encoding or tokenizing one micro-batch may take before the worker counts as hanging and leaves
    encode_timeout_s: float = 120.0
    #: jobs of one claim, however small they are
    max_claim_jobs: int = 1024
    #: dotted names of the functions that jobs may name as RQ callbacks; no others are called or imported
    allow_callbacks: tuple[str, ...] = ()
    #: micro-batches' worth of tokens that are claimed ahead
    prefetch_batches: int = 4
    #: milliseconds for which a micro-batch that is not full waits for more texts
    linger_ms: float = 0.0
    #: milliseconds from enqueueing to the end of encoding for which micro-batches are cut smaller; None: never
    max_latency_ms: float | None = None
    log_format: LogFormat = "text"
    #: port of /livez, /readyz and /metrics; 0: a free one; None: none of them
    metrics_port: int | None = None
    #: file descriptor of a socket that a supervisor listens on for this worker: for its probes, and with a metrics_port
    #: for its metrics too, instead of that port
    metrics_fd: int | None = None
    #: address on which they are served
    metrics_host: str = "127.0.0.1"
    #: seconds without progress on jobs in hand after which /livez turns red
    liveness_timeout_s: float = 180.0
    #: spans by OpenTelemetry; None: where OTEL_EXPORTER_OTLP_ENDPOINT is set
    tracing: bool | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigurationError("the model's name is empty")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigurationError(f"threads must be 1 to 1024, not {self.threads}")
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ConfigurationError(f"max_batch_tokens must be 1 or more, not {self.max_batch_tokens}")
        if self.max_claim_jobs < 1:
            raise ConfigurationError(f"max_claim_jobs must be 1 or more, not {self.max_claim_jobs}")
        if not 2 <= self.prefetch_batches <= 1000:
            raise ConfigurationError(f"prefetch_batches must be 2 to 1000, not {self.prefetch_batches}")
        if not 0 <= self.linger_ms <= 60_000:
            raise ConfigurationError(f"linger_ms must be 0 to 60000 milliseconds, not {self.linger_ms:g}")
        if self.max_latency_ms is not None and not 0 < self.max_latency_ms <= 3_600_000:
            raise ConfigurationError(
                f"max_latency_ms must be above 0 and at most 3600000 milliseconds, not {self.max_latency_ms:g}"
            )
        if not 1 <= self.lease_s <= 86_400:
            raise ConfigurationError(f"lease_s must be 1 to 86400 seconds, not {self.lease_s:g}")
        if not 0 <= self.grace_s <= 86_400:
            raise ConfigurationError(f"grace_s must be 0 to 86400 seconds, not {self.grace_s:g}")
        if not 1 <= self.encode_timeout_s <= 86_400:
            raise ConfigurationError(f"encode_timeout_s must be 1 to 86400 seconds, not {self.encode_timeout_s:g}")
        if self.startup_timeout_s is not None and not 0 <= self.startup_timeout_s <= 86_400:
            raise ConfigurationError(f"startup_timeout_s must be 0 to 86400 seconds, not {self.startup_timeout_s:g}")
        for name in self.allow_callbacks:
            if "." not in name or not all(part.isidentifier() for part in name.split(".")):
                raise ConfigurationError(f"allow_callbacks must be dotted names such as app.hooks.done, not {name!r}")
        if self.log_format not in get_args(LogFormat):
            raise ConfigurationError(f"log_format must be text or json, not {self.log_format!r}")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65_535:
            raise ConfigurationError(f"metrics_port must be 0 to 65535, not {self.metrics_port}")
        if not self.metrics_host:
            raise ConfigurationError("metrics_host is empty; 0.0.0.0 listens on every address")
        if not 1 <= self.liveness_timeout_s <= 86_400:
            raise ConfigurationError(f"liveness_timeout_s must be 1 to 86400 seconds, not {self.liveness_timeout_s:g}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> WorkerSettings:
        """For `rq worker --worker-class`, whose command line has no room for settings of ours."""
        environment = os.environ if environment is None else environment
        given: dict[str, Any] = {}
        for name, read in _READERS.items():
            variable = environment_variable(name)
            if text := environment.get(variable):
                try:
                    given[name] = read(text)
                except ValueError as err:
                    wanted = "true or false" if read is _read_switch else "a number"
                    raise ConfigurationError(f"{variable}={text!r} is not {wanted}") from err
        return cls(**given)


def environment_variable(setting: str) -> str:
    return ENVIRONMENT_PREFIX + setting.upper()


def _read_switch(text: str) -> bool:
    """As click reads a flag's environment variable."""
    if text.lower() in ("1", "true", "t", "yes", "y", "on"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n", "off"):
        return False
    raise ValueError(text)


def _read_names(text: str) -> tuple[str, ...]:
    """Comma-separated."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


_NUMBERS: dict[str, Any] = {
    **dict.fromkeys(("threads", "max_batch_tokens", "max_claim_jobs", "prefetch_batches"), int),
    **dict.fromkeys(("metrics_port", "metrics_fd"), int),
    **dict.fromkeys(("lease_s", "grace_s", "startup_timeout_s", "encode_timeout_s"), float),
    **dict.fromkeys(("linger_ms", "max_latency_ms", "liveness_timeout_s"), float),
}
_SWITCHES: dict[str, Any] = dict.fromkeys(("warm_up", "allow_tf32", "tracing"), _read_switch)
_NAMES: dict[str, Any] = {"allow_callbacks": _read_names}
_READERS: dict[str, Any] = {
    field.name: (_NUMBERS | _SWITCHES | _NAMES).get(field.name, str) for field in fields(WorkerSettings)
}
