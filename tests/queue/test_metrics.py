"""Every metric of a worker is there from the start, and moves as it should."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedq.model import Encoder, NoopEncoder, OutOfMemoryError, TokenizedText
from embedq.producer import EmbedQueue, JobFailedError, JobStatus, keys
from embedq.producer.connection import connect
from embedq.worker.claims import ClaimStore
from embedq.worker.telemetry.metrics import StageSeconds
from tests.conftest import until
from tests.queue.watched_worker import WatchedWorker, watched

#: Of the samples that a worker has before its first job, those without their own labels; `_bucket` left out.
LABELLED = {
    "embedq_jobs_total": [
        {"queue": queue, "outcome": outcome}
        for queue in ("embed", "bulk")
        for outcome in ("finished", "failed", "retried", "canceled", "released", "parked")
    ],
    "embedq_texts_total": [{"queue": "bulk", "outcome": "finished"}],
    "embedq_job_errors_total": [{"queue": "bulk", "code": "encode_failed"}],
    "embedq_retries_total": [{"queue": "embed", "code": "out_of_memory"}],
    "embedq_redis_errors_total": [{"error": "ConnectionError"}, {"error": "TimeoutError"}],
    "embedq_abandoned_jobs_total": [{"queue": "embed"}, {"queue": "bulk"}],
    "embedq_recovered_jobs_total": [{"queue": "embed"}, {"queue": "bulk"}],
    "embedq_stage_seconds_count": [{"stage": s} for s in ("queue", "tokenize", "plan", "encode", "publish")],
    "embedq_device_seconds_total": [{"state": s} for s in ("encoding", "starved", "idle")],
}
PLAIN = (
    "embedq_tokens_total",
    "embedq_microbatches_total",
    "embedq_microbatch_texts_count",
    "embedq_microbatch_tokens_count",
    "embedq_microbatch_fill_ratio_count",
    "embedq_padding_ratio_count",
    "embedq_device_idle_ratio",
    "embedq_prefetched_jobs",
    "embedq_prefetched_tokens",
    "embedq_held_jobs",
    "embedq_oom_splits_total",
    "embedq_float32_fallbacks_total",
    "embedq_lease_renewals_total",
    "embedq_lease_renewals_late_total",
    "embedq_redis_round_trips_total",
    "embedq_tokens_per_second",
    "embedq_last_publish_timestamp_seconds",
    "embedq_live",
    "embedq_ready",
    "process_resident_memory_bytes",
)


class MoodyEncoder(NoopEncoder):
    """Has room for `capacity` tokens, waits for `gate` where there is one, and raises or makes NaN of texts of three or
    four words.
    """

    placement = "cuda:1 float16"
    exact: Encoder | None = None

    def __init__(self) -> None:
        super().__init__(8)
        self.capacity = 10**9
        self.gate: threading.Event | None = None
        self.at_work = threading.Event()
        self.num_failures = 0

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        self.at_work.set()
        if self.gate is not None:
            self.gate.wait(60)
        lengths = [text.num_tokens for text in batch]
        if sum(lengths) > self.capacity:
            raise OutOfMemoryError("no memory")
        if 5 in lengths and self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("not now")
        rows = super().encode_tokens(batch).copy()
        rows[[length == 6 for length in lengths]] = np.nan
        return rows

    def in_float32(self) -> Encoder | None:  # type: ignore[override]
        return self.exact

    def padding_ratio(self, batch: Sequence[TokenizedText]) -> float:  # noqa: ARG002
        return 0.25

    def device_memory(self) -> dict[str, int]:
        return {"allocated": 1, "reserved": 2, "total": 3}


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[MoodyEncoder]:
    made = MoodyEncoder()
    monkeypatch.setattr("embedq.worker.worker.load_encoder", lambda _settings: made)
    yield made
    if made.gate is not None:
        made.gate.set()


def become(worker: WatchedWorker, name: str, value: float, **labels: str) -> None:
    until(lambda: worker.samples().get((name, frozenset(labels.items()))) == value)


def test_every_metric_is_there_before_the_first_job(url: str) -> None:
    with watched(url, "embed", "bulk") as worker:
        samples = worker.samples()
        for name in PLAIN:
            assert (name, frozenset()) in samples, name
        for name, all_labels in LABELLED.items():
            for labels in all_labels:
                assert (name, frozenset(labels.items())) in samples, (name, labels)
        assert worker.value("embedq_jobs_total", queue="bulk", outcome="finished") == 0
        assert worker.value("embedq_live") == worker.value("embedq_ready") == 1
        [model] = [dict(labels) for name, labels in samples if name == "embedq_model_info"]
        assert model == {
            "model": "noop:8",
            "revision": "noop",
            "device": "cpu",
            "dtype": "float32",
            "max_batch_tokens": "16384",
            "dimensions": "8",
        }
        [info] = [dict(labels) for name, labels in samples if name == "embedq_worker_info"]
        assert info.keys() == {"worker", "version", "wire_version"}
        assert info["worker"] == worker.worker.name
        assert not [name for name, _ in samples if name.endswith("_created")]


def test_finished_jobs_move_what_they_should(url: str, queue: EmbedQueue) -> None:
    with watched(url) as worker:
        before = worker.samples()
        started_at = time.time()
        jobs = [queue.enqueue(["two words", "three words here"]), queue.enqueue("one")]
        for job in jobs:
            job.result(timeout=20)
        become(worker, "embedq_jobs_total", 2, queue="embed", outcome="finished")
        assert worker.value("embedq_texts_total", queue="embed", outcome="finished") == 3
        assert worker.value("embedq_tokens_total") == 4 + 5 + 3
        assert worker.value("embedq_microbatch_tokens_sum") == 12
        assert worker.value("embedq_microbatch_texts_sum") == 3
        batches = worker.value("embedq_microbatches_total")
        assert batches in (1, 2)
        assert worker.value("embedq_microbatch_fill_ratio_sum") == pytest.approx(12 / 16_384)
        assert worker.value("embedq_padding_ratio_count") == batches
        assert worker.value("embedq_padding_ratio_sum") == 0
        for stage in ("queue", "plan"):
            assert worker.value("embedq_stage_seconds_count", stage=stage) == 2
        for stage in ("tokenize", "encode", "publish"):
            assert worker.value("embedq_stage_seconds_count", stage=stage) >= 1
            assert worker.value("embedq_stage_seconds_sum", stage=stage) > 0
        assert worker.value("embedq_last_publish_timestamp_seconds") >= started_at - 1
        assert worker.value("embedq_tokens_per_second") > 0
        assert worker.value("embedq_device_seconds_total", state="encoding") > 0
        assert 0 < worker.value("embedq_device_idle_ratio") < 1
        assert worker.value("embedq_held_jobs") == 0
        trips = ("embedq_redis_round_trips_total", frozenset[Any]())
        assert worker.samples()[trips] > before[trips]


def test_jobs_in_hand_and_those_claimed_ahead_are_gauges(url: str, queue: EmbedQueue, encoder: MoodyEncoder) -> None:
    encoder.gate = threading.Event()
    with watched(url) as worker:
        queue.enqueue("at work")
        assert encoder.at_work.wait(20)
        queue.enqueue_many(["waits here", "and here"])
        become(worker, "embedq_held_jobs", 3)
        become(worker, "embedq_prefetched_jobs", 2)
        become(worker, "embedq_prefetched_tokens", 8)
        encoder.gate.set()
        become(worker, "embedq_held_jobs", 0)
        assert worker.value("embedq_prefetched_jobs") == worker.value("embedq_prefetched_tokens") == 0


def test_a_retry_is_counted_and_so_is_the_attempt_that_ends_well(
    url: str, queue: EmbedQueue, encoder: MoodyEncoder
) -> None:
    encoder.num_failures = 2  # the micro-batch of one text is not halved; the first attempt and the second
    with watched(url) as worker:
        job = queue.enqueue(["one two three"], retries=3)
        job.result(timeout=30)
        become(worker, "embedq_jobs_total", 1, queue="embed", outcome="finished")
        retried = worker.value("embedq_jobs_total", queue="embed", outcome="retried")
        assert retried == worker.value("embedq_retries_total", queue="embed", code="encode_failed") == 2
        assert worker.value("embedq_job_errors_total", queue="embed", code="encode_failed") == 2
        assert worker.value("embedq_jobs_total", queue="embed", outcome="failed") == 0
        # Tried again apart from the others, which counts as encoding, too.
        assert worker.value("embedq_microbatches_total") == 3
        assert worker.value("embedq_stage_seconds_count", stage="encode") == 3


def test_a_failure_is_counted_by_its_code(url: str, queue: EmbedQueue, encoder: MoodyEncoder) -> None:
    encoder.num_failures = 100
    with watched(url) as worker:
        job = queue.enqueue(["one two three", "fine"], retries=0)
        with pytest.raises(JobFailedError):
            job.result(timeout=20)
        become(worker, "embedq_jobs_total", 1, queue="embed", outcome="failed")
        assert worker.value("embedq_texts_total", queue="embed", outcome="failed") == 2
        assert worker.value("embedq_job_errors_total", queue="embed", code="encode_failed") == 1
        assert worker.value("embedq_retries_total", queue="embed", code="encode_failed") == 0


def test_a_canceled_job_is_counted_once(url: str, queue: EmbedQueue, encoder: MoodyEncoder) -> None:
    encoder.gate = threading.Event()
    with watched(url) as worker:
        at_work, waiting = queue.enqueue(["at", "work"]), None
        assert encoder.at_work.wait(20)
        waiting = queue.enqueue("waits")
        become(worker, "embedq_held_jobs", 2)
        queue.cancel(at_work.id)
        queue.cancel(waiting.id)
        become(worker, "embedq_jobs_total", 2, queue="embed", outcome="canceled")
        encoder.gate.set()
        become(worker, "embedq_held_jobs", 0)
        assert worker.value("embedq_jobs_total", queue="embed", outcome="canceled") == 2
        assert worker.value("embedq_texts_total", queue="embed", outcome="canceled") == 3
        assert worker.value("embedq_jobs_total", queue="embed", outcome="finished") == 0
        assert worker.worker.stages.num_finished == 0


def test_a_job_that_was_taken_over_counts_for_nobody_here(url: str, queue: EmbedQueue, encoder: MoodyEncoder) -> None:
    encoder.gate = threading.Event()
    with watched(url) as worker, connect(url) as client:
        job = queue.enqueue("taken")
        assert encoder.at_work.wait(20)
        # As when the lease has run out, and another worker has not done it yet.
        client.delete(keys.started("embed"))
        encoder.gate.set()
        become(worker, "embedq_held_jobs", 0)
        assert job.status() == JobStatus.STARTED
        assert worker.value("embedq_jobs_total", queue="embed", outcome="finished") == 0
        assert worker.worker.stages.num_finished == 0


def test_released_jobs_are_counted(url: str, queue: EmbedQueue, encoder: MoodyEncoder) -> None:
    encoder.gate = threading.Event()
    with watched(url) as worker:
        queue.enqueue("at work")
        assert encoder.at_work.wait(20)
        queue.enqueue_many(["waits", "too"])
        become(worker, "embedq_held_jobs", 3)
        worker.worker._end_orderly()
        encoder.gate.set()
        until(lambda: not worker.worker.leases.num_held)
        metrics = worker.worker.monitor._metrics
        assert metrics is not None
        released = metrics.registry.get_sample_value("embedq_jobs_total", {"queue": "embed", "outcome": "released"})
        assert released == 2


def test_jobs_of_dead_workers_are_counted_by_who_finds_them(url: str, queue: EmbedQueue) -> None:
    queue.enqueue("again", retries=1)
    queue.enqueue("never again", retries=0)
    with connect(url) as client:
        dead = ClaimStore(client, "dead", 1)
        assert len(dead.claim(["embed"], 10, 10**6).claims) == 2
        with watched(url, lease_s=1) as worker:
            become(worker, "embedq_abandoned_jobs_total", 1, queue="embed")
            become(worker, "embedq_recovered_jobs_total", 1, queue="embed")
            become(worker, "embedq_jobs_total", 1, queue="embed", outcome="finished")
            assert worker.value("embedq_lease_renewals_total") > 1


def test_a_micro_batch_halved_for_memory_and_a_text_made_in_float32_are_counted(
    url: str, queue: EmbedQueue, encoder: MoodyEncoder
) -> None:
    encoder.capacity = 8
    encoder.exact = NoopEncoder(8)
    with watched(url) as worker:
        queue.enqueue(["a b", "c d", "e f", "g h"]).result(timeout=20)
        assert worker.value("embedq_oom_splits_total") == 1
        queue.enqueue("this is not finite").result(timeout=20)
        assert worker.value("embedq_float32_fallbacks_total") == 1
        assert worker.value("embedq_padding_ratio_sum") == 0.25 * worker.value("embedq_padding_ratio_count") > 0
        assert worker.value("embedq_gpu_memory_bytes", kind="reserved") == 2
        [model] = [dict(labels) for name, labels in worker.samples() if name == "embedq_model_info"]
        assert (model["device"], model["dtype"]) == ("cuda:1", "float16")


def test_a_late_renewal_is_counted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, delays = ClaimStore.renew, [0.0, 1.0]

    def slow(self: ClaimStore, *args: Any) -> Any:
        time.sleep(delays.pop(0) if delays else 0.0)
        return renew(self, *args)

    monkeypatch.setattr(ClaimStore, "renew", slow)
    with watched(url, lease_s=2) as worker:
        until(lambda: worker.value("embedq_lease_renewals_late_total") >= 1)


def test_an_error_of_redis_is_counted_by_its_class(url: str, queue: EmbedQueue) -> None:
    with watched(url) as worker:
        assert worker.value("embedq_redis_errors_total", error="ConnectionError") == 0
        # Also that on which it waits for jobs.
        queue._redis.client_kill_filter(_type="normal", skipme=True)
        until(lambda: worker.value("embedq_redis_errors_total", error="ConnectionError") > 0)
        queue.enqueue("goes on").result(timeout=20)


def test_a_stages_bucket_has_what_is_up_to_its_bound() -> None:
    stages = StageSeconds("seconds", "?", (0.1, 1.0))
    stages.observe("queue", [0.05, 0.1, 0.5, 3.0])
    stages.observe("queue", [1.0])
    [family] = stages.collect()
    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in family.samples
        if sample.labels["stage"] == "queue"
    }
    assert found[("seconds_bucket", "0.1")] == 2
    assert found[("seconds_bucket", "1")] == 4
    assert found[("seconds_bucket", "+Inf")] == found[("seconds_count", None)] == 5
    assert found[("seconds_sum", None)] == pytest.approx(4.65)


def test_what_openmetrics_asks_for_it_gets(url: str) -> None:
    with watched(url) as worker:
        metrics = worker.worker.monitor._metrics
        assert metrics is not None
        body, content_type = metrics.exposed("application/openmetrics-text; version=1.0.0")
        assert content_type.startswith("application/openmetrics-text")
        assert body.endswith(b"# EOF\n")


def test_no_library_of_metrics_is_loaded_without_a_port(url: str) -> None:
    code = (
        "import sys\n"
        "from embedq.producer.connection import connect\n"
        "from embedq.worker import EmbedWorker, WorkerSettings\n"
        f"with connect({url!r}) as client:\n"
        "    EmbedWorker(['embed'], connection=client, settings=WorkerSettings(model='noop:8')).work(burst=True)\n"
        "sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_port_without_the_library_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from embedq.worker.cli import main\n"
        "main(['worker', '--model', 'noop:8', '--metrics-port', '0', '--url', 'redis://127.0.0.1:1'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stderr.strip().splitlines()[-1]) == (
        2,
        "error: prometheus_client is not installed, which --metrics-port needs: pip install 'embedq[metrics]'",
    )
