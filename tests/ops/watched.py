"""Exercise: all that happens to a fleet is done to it on purpose, and every metric moves by it as it must."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from embedq.producer import keys
from tests.ops import contract
from tests.ops.charts import page
from tests.ops.dashboards import DASHBOARD, ask_all, read_queries
from tests.ops.finding import Finding
from tests.ops.load import PRODUCER
from tests.ops.moves import Watch, becomes, less, more
from tests.ops.places import Served, until
from tests.ops.prometheus import Prometheus, find_binary
from tests.ops.stand_in import harmful, linger
from tests.ops.supervised import PROCESSES, RESTARTS, Supervised
from tests.ops.upgrade import NEWER
from tests.ops.world import LEASE_S, QUEUE, World, pause

#: Jobs of a burst, some seconds' work of one worker.
BURST_JOBS = 2500
WORDS = " ".join(["word"] * 20)
#: Seconds for which a worker stands still: longer than a renewal may be late, shorter than its lease.
STILL_S = LEASE_S / 2
#: What a worker waits for when it leaves.
LINGER = f"{linger.__module__}.{linger.__name__}"
#: Processes of the supervisor that comes last.
SUPERVISED = 2
RELEASED = [more(f"embedq_{what}_total", queue=QUEUE, outcome="released") for what in ("jobs", "texts")]
#: Texts of a job of which one wants few others beside it.
CROWD_TEXTS = 8


class Watched:
    """Two workers and an exporter, and everything that moves their metrics."""

    def __init__(self, world: World, finding: Finding) -> None:
        self._world = world
        self._queue = world.queue
        self._watch = Watch(finding)
        self._finding = finding
        self.exporter = world.keep(world.exporter())
        self.supervised = Supervised(world, size=SUPERVISED)
        self.workers = [world.keep(world.worker(f"worker-{place}", "--allow-callback", LINGER)) for place in range(2)]

    @property
    def places(self) -> list[Served]:
        return [*self.workers, self.exporter]

    def run(self) -> None:
        for place in self.places:
            place.await_ready()
        self._beginning()
        self._steady_load()
        self._burst()
        self._harm()
        self._cancel()
        self._waiting_elsewhere()
        self._suspend()
        self._stand_still()
        self._redis_away()
        self._die()
        self._leave()
        self._supervise()
        self._tell_unmoved()

    def _beginning(self) -> None:
        with self._watch.expecting(
            "two workers are ready",
            self.places,
            becomes(2, "embedq_live"),
            becomes(2, "embedq_ready"),
            becomes(2, "embedq_model_info", model="noop:768"),
            becomes(2, "embedq_worker_info"),
            becomes(1, "embedq_redis_up"),
            becomes(2**30, "embedq_redis_max_memory_bytes"),
            becomes(0, "embedq_suspended"),
            becomes(2, "embedq_fleet_workers", state="idle"),
            more("embedq_lease_renewals_total"),
            more("embedq_device_seconds_total", state="idle"),
            more("process_cpu_seconds_total"),
        ):
            pass

    def _steady_load(self) -> None:
        moves = [more(f"embedq_{what}_total", queue=QUEUE, outcome="finished") for what in ("jobs", "texts")]
        moves += [
            more(f"embedq_{what}")
            for what in [
                "tokens_total",
                "microbatches_total",
                "microbatch_texts_count",
                "microbatch_texts_sum",
                "microbatch_texts_bucket",
                "microbatch_tokens_count",
                "microbatch_tokens_sum",
                "microbatch_tokens_bucket",
                "microbatch_fill_ratio_count",
                "microbatch_fill_ratio_sum",
                "microbatch_fill_ratio_bucket",
                "padding_ratio_count",
                "padding_ratio_bucket",
                "tokens_per_second",
                "redis_round_trips_total",
                "last_publish_timestamp_seconds",
            ]
        ]
        for stage in ("queue", "tokenize", "plan", "encode", "publish"):
            moves += [more(f"embedq_stage_seconds_{what}", stage=stage) for what in ("count", "sum", "bucket")]
        moves += [more("embedq_device_seconds_total", state="encoding"), less("embedq_device_idle_ratio")]
        moves += [
            more("embedq_queue_jobs", status="finished"),
            more("embedq_fleet_tokens_per_second", queue=QUEUE),
            more("embedq_fleet_workers", state="busy"),
            more("embedq_redis_used_memory_bytes"),
            more("process_resident_memory_bytes"),
        ]
        with self._world.load("steady", 100.0) as load, self._watch.expecting("a steady load", self.places, *moves):
            self._world.await_flow(load)

    def _burst(self) -> None:
        waiting = [
            more("embedq_prefetched_jobs"),
            more("embedq_prefetched_tokens"),
            more("embedq_held_jobs"),
            more("embedq_device_seconds_total", state="starved"),
            *(more("embedq_queue_jobs", queue=QUEUE, status=status) for status in ("queued", "started")),
            *(more(f"embedq_queue_{what}") for what in ("texts", "tokens", "oldest_job_age_seconds")),
            more("embedq_queue_backlog_seconds"),
        ]
        with self._watch.expecting("a burst of jobs", self.places, *waiting):
            self._put_burst("burst")
        done = [move.metric for move in waiting if move.metric != "embedq_device_seconds_total"]
        before = self._watch.scrape(self.places)
        back = [becomes(0, metric) for metric in done if not metric.startswith("embedq_queue_")]
        back += [becomes(0, f"embedq_queue_{what}", queue=QUEUE) for what in ("texts", "tokens", "backlog_seconds")]
        self._watch.await_moves("the burst is over", self.places, before, back)

    def _harm(self) -> None:
        queue, places = self._queue, self.places
        code = "encode_failed"
        with self._watch.expecting(
            "a text that cannot be encoded",
            places,
            *(more(f"embedq_{what}_total", queue=QUEUE, outcome="failed") for what in ("jobs", "texts")),
            more("embedq_job_errors_total", code=code),
            more("embedq_queue_jobs", status="failed"),
        ):
            queue.enqueue(harmful("raise"), retries=0)
        with self._watch.expecting(
            "one that is tried again",
            places,
            more("embedq_jobs_total", outcome="retried"),
            more("embedq_retries_total", queue=QUEUE, code=code),
        ):
            queue.enqueue(harmful("raise", "again"), retries=1)
        with self._watch.expecting("memory runs out", places, more("embedq_oom_splits_total")):
            queue.enqueue([harmful("crowd", f"text {place}") for place in range(CROWD_TEXTS)])
        with self._watch.expecting("a vector is not finite", places, more("embedq_float32_fallbacks_total")):
            queue.enqueue(harmful("nan"))

    def _cancel(self) -> None:
        with self._watch.expecting(
            "jobs in hand are canceled",
            self.places,
            *(more(f"embedq_{what}_total", outcome="canceled") for what in ("jobs", "texts")),
            more("embedq_queue_jobs", status="canceled"),
        ):
            ids = self._put_burst("canceled")
            until(lambda: self._started(ids), "no job is started")
            for job_id in self._started(ids)[-100:]:
                self._queue.cancel(job_id)

    def _waiting_elsewhere(self) -> None:
        with self._watch.expecting(
            "jobs are put off, and wait for others",
            self.places,
            more("embedq_queue_jobs", status="scheduled"),
            more("embedq_queue_jobs", status="deferred"),
        ):
            later = self._queue.enqueue_in(3600, "later")
            self._queue.enqueue("after that", depends_on=later.id)
        with (
            self._watch.expecting(
                "jobs of a newer wire version",
                self.places,
                more("embedq_jobs_total", outcome="parked"),
                more("embedq_queue_jobs", status="parked"),
            ),
            self._world.load("newer", 20.0, modules=[NEWER, PRODUCER]),
        ):
            until(self._world.num_parked, "no job is parked")

    def _suspend(self) -> None:
        redis = self._queue._redis
        with self._watch.expecting(
            "rq suspend",
            self.places,
            becomes(1, "embedq_suspended"),
            becomes(0, "embedq_ready"),
            becomes(2, "embedq_fleet_workers", state="suspended"),
        ):
            redis.set(keys.SUSPENDED, 1)
        with self._watch.expecting(
            "rq resume", self.places, becomes(0, "embedq_suspended"), becomes(2, "embedq_ready")
        ):
            redis.delete(keys.SUSPENDED)

    def _stand_still(self) -> None:
        with self._watch.expecting(
            f"a worker stands still for {STILL_S:g} s", self.places, more("embedq_lease_renewals_late_total")
        ):
            self.workers[1].signal(signal.SIGSTOP)
            pause(STILL_S)
            self.workers[1].signal(signal.SIGCONT)

    def _redis_away(self) -> None:
        before = self._watch.scrape(self.places)
        self._world.redis.kill()
        self._watch.await_moves("Redis is killed", [self.exporter], before, [becomes(0, "embedq_redis_up")])
        self._world.redis.start()
        self._watch.await_moves(
            "Redis is back",
            self.places,
            before,
            [becomes(1, "embedq_redis_up"), more("embedq_redis_errors_total"), becomes(2, "embedq_ready")],
        )

    def _die(self) -> None:
        survivor, victim = self.workers
        with self._watch.expecting(
            "a worker is killed with jobs in hand",
            [survivor, self.exporter],
            more("embedq_recovered_jobs_total", queue=QUEUE),
            more("embedq_abandoned_jobs_total", queue=QUEUE),
        ):
            self._put_burst("retried")
            self._put_burst("once", retries=0)
            until(lambda: self._holds(victim, "retried") and self._holds(victim, "once"), "a worker holds no jobs")
            victim.kill()
        self.workers.remove(victim)
        self._await_rest()

    def _leave(self) -> None:
        """What it gives back is told by the last scrapes before its end, for which it waits for a callback."""
        [worker] = self.workers
        self._put_burst("released")
        until(lambda: self._holds(worker, "released"), "the worker holds no jobs")
        before = self._watch.scrape([worker])
        job = self._queue.enqueue("with a callback", on_success=LINGER, at_front=True)
        until(lambda: job.status() == "finished", "the job with a callback does not end")
        worker.signal(signal.SIGTERM)
        self._watch.await_moves("SIGTERM with jobs in hand", [worker], before, RELEASED)

    def _supervise(self) -> None:
        place = self.supervised.place
        states = [becomes(SUPERVISED, PROCESSES, state="running"), more("embedq_live", process="1")]
        with self._watch.expecting("a supervisor", [place], *states):
            self.supervised.start()
        with self._watch.expecting(
            "one of its processes is killed", [place], more(RESTARTS, reason="exit"), more(PROCESSES, state="starting")
        ):
            os.kill(next(iter(self.supervised.pids())), signal.SIGKILL)

    def _tell_unmoved(self) -> None:
        promised = contract.WORKER | contract.EXPORTER | contract.SUPERVISOR
        self._finding.check_none("metrics of the contract that no scrape had", sorted(promised - self._watch.seen))
        quiet = promised - self._watch.moved - contract.QUIET
        self._finding.check_none("metrics of the contract that nothing moved", sorted(quiet))

    # --- jobs

    def _put_burst(self, name: str, **options: int) -> list[str]:
        ids = [f"{name}-{number}" for number in range(BURST_JOBS)]
        self._queue.enqueue_many([f"{each} {WORDS}" for each in ids], job_ids=ids, **options)
        return ids

    def _started(self, ids: Sequence[str]) -> list[str]:
        return [job_id for job_id, status in self._queue.statuses(ids).items() if status == "started"]

    def _holds(self, place: Served, burst: str) -> bool:
        redis = self._queue._redis
        names = [key for key in redis.smembers(keys.WORKERS) if f".{place.pid}.".encode() in key]
        held = [pair for key in names for pair in redis.smembers(key + b":executions")]
        return any(pair.startswith(f"{burst}-".encode()) for pair in held)

    def _await_rest(self) -> None:
        until(lambda: not self._queue.depth(), "the queue is not empty")


def metrics_move(world: World) -> list[Finding]:
    """And the dashboard has data of it, where there is a Prometheus."""
    finding = Finding(
        "Metrics",
        [
            "Two workers and an exporter, at last a supervisor, and all that may happen to them, done on purpose."
            " Each metric's value before it and after, added up over the processes that live.",
        ],
    )
    watched = Watched(world, finding)
    binary = find_binary()
    if binary is None:
        watched.run()
        return [finding]
    targets = {
        "embedq-worker": [f"127.0.0.1:{place.port}" for place in (*watched.workers, watched.supervised.place)],
        "embedq-exporter": [f"127.0.0.1:{watched.exporter.port}"],
    }
    prometheus = world.keep(Prometheus(binary, world.folder, targets))
    prometheus.await_ready()
    first = time.time()
    watched.run()
    return [finding, _dashboard(world, prometheus, first)]


def _dashboard(world: World, prometheus: Prometheus, first: float) -> Finding:
    last = time.time()
    finding = Finding(
        "Dashboard",
        [
            "A Prometheus with the configuration and the rules that ship scraped all that once a second; every query"
            " of the Grafana dashboard is asked of it for that time.",
        ],
    )
    ask_all(finding, prometheus, first, last)
    queries = read_queries(DASHBOARD)
    (world.folder / "dashboard.html").write_text(page(queries, lambda expr: prometheus.series(expr, first, last)))
    return finding
