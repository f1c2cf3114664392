"""The worker: claims jobs, encodes their texts in shared micro-batches, publishes the results.

An RQ worker to everyone else (`rq info`, `rq worker --worker-class`, suspend, shutdown commands); only its loop is
ours. It claims on the main thread; the other stages have threads of their own in `pipeline`. Knows when to claim and
the signals; Redis is in `claims`, tensors are behind `engine`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import redis
from rq import worker_registration
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.exceptions import StopRequested
from rq.rate_limit import RateLimitRegistry
from rq.registry import ReadyJobRegistry
from rq.utils import now
from rq.worker import DequeueStrategy, SimpleWorker, WorkerStatus

from embedq.producer import keys
from embedq.producer.connection import SOCKET_TIMEOUT_S, is_passing, is_wrong_type
from embedq.producer.errors import ConfigurationError
from embedq.producer.serializer import EmbedSerializer
from embedq.worker.callbacks import CallbackThread
from embedq.worker.chores import Chores
from embedq.worker.claims import Claimed, ClaimStore, Outcome
from embedq.worker.commands import CommandHandler, survive
from embedq.worker.departure import LAST_WORDS_S, Departure
from embedq.worker.encoders import load_encoder
from embedq.worker.engine import Engine
from embedq.worker.estimates import ClaimBudget
from embedq.worker.foreign_jobs import ForeignJob
from embedq.worker.interruptions import Interruptions
from embedq.worker.leases import LeaseKeeper
from embedq.worker.memory import keep_freed_memory, rare_collections
from embedq.worker.pipeline import Bounds, Pipeline
from embedq.worker.planning import QueueTurns
from embedq.worker.promotion import Promoter
from embedq.worker.quarantine import Quarantine
from embedq.worker.sequels import Sequels, errors_logged
from embedq.worker.settings import WorkerSettings
from embedq.worker.stages import AtWork, WorkerStages, blamed
from embedq.worker.startup import RECONNECT_FIRST_S, RECONNECT_LONGEST_S, leaving_at_once, until_served
from embedq.worker.statuses import EXIT_HANGS
from embedq.worker.telemetry import logs
from embedq.worker.telemetry.monitor import Monitor, Parts
from embedq.worker.telemetry.tracing import Identity, Spans, open_spans
from embedq.worker.waiting import QueueWaiter
from embedq.worker.watchdog import Watchdog

logger = logging.getLogger("embedq.worker")

#: Seconds an idle worker sleeps at most before it looks after its registries and at `rq suspend`.
IDLE_S = 15.0
#: Seconds without a job after which a worker says that it is idle.
IDLE_AFTER_S = 0.25
#: Of the time that a full micro-batch takes, the share for which jobs gather while the device is busy.
GATHER_SHARE = 1 / 8
#: Seconds for which one thread may keep the others from running Python. The device's needs it after every operator,
#: and must not wait for Python's default, 5 ms, each time that another is at work.
SWITCH_INTERVAL_S = 0.0005


class EmbedWorker(SimpleWorker):
    """An RQ worker that drains its queues in micro-batches.

    Takes RQ's arguments and `settings`, which default to the environment's (EMBEDQ_MODEL, ...). RQ's `serializer`
    argument is ignored: jobs of ours are JSON and safetensors, and pickle is never read.
    """

    # Made by `work`: a worker that `Worker.all()` only looks at has none of them.
    settings: WorkerSettings
    monitor: Monitor
    departure: Departure
    engine: Engine
    budget: ClaimBudget
    store: ClaimStore
    leases: LeaseKeeper
    callbacks: CallbackThread
    sequels: Sequels
    promoter: Promoter
    chores: Chores
    commands: CommandHandler
    waiter: QueueWaiter
    turns: QueueTurns
    watchdog: Watchdog
    spans: Spans
    stages: WorkerStages
    pipeline: Pipeline
    quarantine: Quarantine

    def __init__(
        self,
        queues: Any,
        *args: Any,
        settings: WorkerSettings | None = None,
        monitor: Monitor | None = None,
        **kwargs: Any,
    ) -> None:
        """monitor: one that others see already; None for one of its own while it works."""
        kwargs["serializer"] = EmbedSerializer
        super().__init__(queues, *args, **kwargs)
        self._given_settings = settings
        self._given_monitor = monitor
        #: held from a claim to the moment at which it is known as held, and by who leaves for good
        self._claiming = threading.Lock()

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        """RQ would raise the time limit of every command to seven minutes, for a command that blocks. None of ours does
        without looking after itself, and a Redis that hangs must be noticed within a lease.
        """
        options = connection.connection_pool.connection_kwargs
        if options.get("socket_timeout") is None:
            options["socket_timeout"] = SOCKET_TIMEOUT_S
        return connection

    # --- RQ's entry point

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Works until it is stopped; in `burst` mode until the queues are empty. True if any job was done.

        Raises ModelError, ConfigurationError and redis-py's errors before it has registered itself; SIGTERM and Ctrl-C
        end it at once until then.
        """
        self.settings = self._given_settings or WorkerSettings.from_environment()
        self._dequeue_strategy = dequeue_strategy
        with contextlib.ExitStack() as on_exit:
            if with_scheduler:
                # It forks, which must come before the encoder's threads.
                self._start_scheduler(burst, logging_level, date_format, log_format)
                on_exit.callback(self._stop_scheduler)
            on_exit.enter_context(leaving_at_once())
            self.monitor = self._given_monitor or on_exit.enter_context(
                Monitor(self.settings, self.name, self.queue_names(), self.connection)
            )
            self._prepare()
            on_exit.callback(self.waiter.close)
            self.callbacks.start()
            # `rq worker` sets up RQ's loggers alone.
            logs.configure_own(self.settings.log_format, logging_level or logging.INFO, self.name)
            # Before anybody can see this worker and send it a signal.
            on_exit.enter_context(self._own_signals())
            on_exit.callback(self._leave)
            self._register(logging_level, date_format, log_format)
            self.leases.start()
            self.chores.start()
            self.monitor.health.begin()
            on_exit.enter_context(rare_collections())
            on_exit.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            return self._work(burst, max_jobs, max_idle_time) > 0

    def _prepare(self) -> None:
        keep_freed_memory()
        settings, observer = self.settings, self.monitor.observer
        self.departure = Departure(settings.grace_s, self._end_orderly, self._say_last_words)
        self.callbacks = CallbackThread(settings.allow_callbacks)
        self.watchdog = Watchdog(settings.encode_timeout_s, self._end_hanging)
        self.engine = Engine(
            load_encoder(settings), settings.max_batch_tokens, self.name, self.watchdog.watching, observer
        )
        self.budget = ClaimBudget(self.engine.max_batch_tokens)
        encoder = self.engine.encoder
        self.spans = open_spans(settings.tracing, Identity(self.name, encoder.name, encoder.placement))
        self.store = ClaimStore(self.connection, self.name, settings.lease_s, with_traces=self.spans.are_wanted)
        self.sequels = Sequels(self.connection, self.queue_names(), self.callbacks, self._exc_handlers)
        self.promoter = Promoter(self.connection, self.queue_names())
        self.chores = Chores(self._tick)
        self.leases = LeaseKeeper(
            self.store,
            self.queue_names(),
            self.worker_ttl + 60,
            on_abandoned=lambda queue, ids: self.chores.submit(lambda: self.sequels.follow_all(queue, ids)),
            on_forgotten=self._register_again,
            on_tick=self._tick_leases,
            observer=observer,
        )
        interruptions = Interruptions(self.connection, self.name, self.leases, self.sequels, observer)
        self.commands = CommandHandler(
            on_shutdown=lambda: os.kill(os.getpid(), signal.SIGINT),
            on_stop=interruptions.stop,
            on_cancel=interruptions.cancel,
        )
        self.waiter = QueueWaiter(self.connection, self.queue_keys())
        self.turns = QueueTurns()
        # Where the queues take turns, none is more urgent than another.
        ranked = self.queue_names() if self._dequeue_strategy == DequeueStrategy.DEFAULT else []
        self.stages = WorkerStages(
            self.engine,
            self.store,
            self.leases,
            self.budget,
            ranked,
            self.sequels,
            self.watchdog,
            self.spans,
            observer,
        )
        self.pipeline = Pipeline(self.stages, self._bounds(), on_failure=self._end_claiming)
        self.quarantine = Quarantine(self.stages, self.store, self.engine.max_batch_tokens, self.pipeline.device_time)
        self.monitor.attach(Parts(self.engine, self.pipeline, self.leases, self.chores, self.budget))

    def _bounds(self) -> Bounds:
        settings = self.settings
        return Bounds(
            max_batch_tokens=self.engine.max_batch_tokens,
            prefetch_tokens=settings.prefetch_batches * self.engine.max_batch_tokens,
            prefetch_jobs=settings.prefetch_batches * settings.max_claim_jobs,
            linger_s=settings.linger_ms / 1000,
            max_latency_s=None if settings.max_latency_ms is None else settings.max_latency_ms / 1000,
        )

    @contextlib.contextmanager
    def _own_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are this worker's while the block runs."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._install_signal_handlers()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _register(self, logging_level: str | None, date_format: str, log_format: str) -> None:
        try:
            until_served(
                self.connection,
                lambda: self.bootstrap(logging_level, date_format, log_format),
                self.settings.startup_timeout_s,
                self._sleep_or_leave,
            )
        except ValueError as err:
            raise ConfigurationError(f"{err}; choose another --name") from err
        encoder = self.engine.encoder
        logger.info(
            "worker %s serves %s on %s: queues %s, up to %d tokens a micro-batch, leases of %g s",
            *(self.name, encoder.name, encoder.placement, ", ".join(self.queue_names())),
            *(self.engine.max_batch_tokens, self.settings.lease_s),
            extra={
                "event": "serving",
                "model": encoder.name,
                "device": encoder.placement,
                "queues": self.queue_names(),
            },
        )

    def register_birth(self) -> None:
        """As RQ's, for several attempts: the name that one of them finds taken may have been by the one before."""
        if self.birth_date is None:
            super().register_birth()
        else:
            self._write_registration()

    def _sleep_or_leave(self, seconds: float) -> None:
        """Between two attempts to register there is nothing to finish."""
        self._sleep(seconds)
        if self.departure.signal is not None:
            raise SystemExit(128 + self.departure.signal)

    def _leave(self) -> None:
        """Gives back what is claimed and unregisters. A Redis that is gone does not hide why the worker ends."""
        self.monitor.health.end()
        try:
            self._release_held()
            self.leases.stop()
            self.chores.stop()
            self.callbacks.close(self.departure.grace_left_s())
            if self.birth_date is not None:
                self.teardown()
        except redis.RedisError as err:
            logger.warning("left without a word to Redis (%s); claimed jobs return when their leases end", err)
        self.spans.close(self.departure.grace_left_s() / 2)
        self.departure.done()

    def _stop_scheduler(self) -> None:
        """RQ stops it only with a worker that has registered."""
        process: Any = self.scheduler and self.scheduler._process
        if process and process.is_alive():
            self.stop_scheduler()

    def _work(self, burst: bool, max_jobs: int | None, max_idle_s: float | None) -> int:
        """Claims until told to stop, while the pipeline's threads do the rest; returns the number of jobs done."""
        before_s = time.thread_time()
        self.pipeline.start()
        try:
            self._feed(burst, max_jobs, max_idle_s)
        except Exception:
            self.pipeline.stop()
            raise
        except BaseException:
            # A second signal waits for nothing.
            self.pipeline.ask_to_stop()
            raise
        self.pipeline.stop()
        self.pipeline.check()
        done = self._count_done()
        self.engine.log.tell()
        logger.info("worker %s: %d jobs done, stopping", self.name, done, extra={"event": "stopping", "jobs": done})
        self._tell_times(before_s)
        return done

    def _feed(self, burst: bool, max_jobs: int | None, max_idle_s: float | None) -> None:
        """The claiming loop."""
        claimed = 0
        reconnect_s = RECONNECT_FIRST_S
        while not self._stop_requested and (max_jobs is None or claimed < max_jobs or self.quarantine):
            try:
                self._look_after_queues()
                if self.quarantine:
                    if self.pipeline.wait_until_empty(IDLE_S):
                        self.quarantine.work(lambda: self._stop_requested)
                    continue
                if not self.pipeline.wait_for_room(IDLE_S):
                    continue
                # Before the claim: what is published after it may have put a job onto the queue.
                had_jobs = self.pipeline.num_jobs > 0
                found = self._claim(None if max_jobs is None else max_jobs - claimed)
                claimed += len(found.claims)
                if found.state == "suspended":
                    self.check_for_suspension(burst)
                elif found.state == "empty" and claimed != max_jobs:
                    if burst and not had_jobs and not found.claims:
                        break
                    if burst:
                        self.pipeline.wait_until_empty(IDLE_S)
                    elif not self.quarantine and not self._await_jobs(max_idle_s):
                        break
                reconnect_s = RECONNECT_FIRST_S
            except StopRequested:
                break
            except redis.RedisError as err:
                if not is_passing(err) and not is_wrong_type(err):
                    raise
                fields = {"event": "redis_unavailable", "error": type(err).__name__}
                logger.warning("Redis cannot serve (%s); trying again in %.1f s", err, reconnect_s, extra=fields)
                self.monitor.observer.kept_waiting()
                self.waiter.forget()
                self._sleep(reconnect_s)
                reconnect_s = min(2 * reconnect_s, RECONNECT_LONGEST_S)
        while not self._stop_requested and not self.pipeline.wait_until_empty(IDLE_S):
            pass

    def _claim(self, max_jobs: int | None) -> Claimed:
        limit = min(self.settings.max_claim_jobs, self.pipeline.room_jobs())
        names = [queue.name for queue in self._ordered_queues]
        if self._dequeue_strategy == DequeueStrategy.DEFAULT:
            names = self.turns.order(names)
        with self._claiming:
            if self._stop_requested:
                return Claimed([])
            found = self.store.claim(names, limit if max_jobs is None else min(limit, max_jobs), self.budget.max_bytes)
            self.leases.hold(found.claims)
        self.spans.claimed(found.claims)
        if found.claims:
            self._state = WorkerStatus.BUSY.value  # as claim.lua told Redis
            self.monitor.observer.claimed(found.claims)
            first = [claim for claim in found.claims if not claim.attempts]
            if first:
                self.pipeline.put(first, self.budget.tokens(sum([len(claim.data) for claim in first])))
            self.quarantine.put([claim for claim in found.claims if claim.attempts])
            self.reorder_queues(next(queue for queue in self.queues if queue.name == found.claims[0].queue))
        self.pipeline.queue_is_empty(found.state != "more")
        return found

    def _await_jobs(self, max_idle_s: float | None) -> bool:
        """With the queues empty: waits for a job, or for the time to look after the queues. False to end."""
        idle_since = time.monotonic()
        while not self._stop_requested:
            says_idle = self.get_state() == WorkerStatus.IDLE
            if self.waiter.wait(min(IDLE_S, max_idle_s or IDLE_S) if says_idle else IDLE_AFTER_S):
                # What comes now can only wait for the device: let there be more of it in one claim.
                self.pipeline.wait_while_encoding(GATHER_SHARE)
                return True
            self.pipeline.check()
            idle_s = time.monotonic() - idle_since
            if self.pipeline.num_jobs:
                idle_since = time.monotonic()
            elif max_idle_s is not None and idle_s >= max_idle_s:
                return False
            elif not says_idle and idle_s >= IDLE_AFTER_S:
                self.set_state(WorkerStatus.IDLE)
            elif idle_s >= IDLE_S:
                return True
        return True

    def _count_done(self) -> int:
        self.successful_job_count, self.failed_job_count = self.stages.num_finished, self.stages.num_failed
        return self.stages.num_finished + self.stages.num_failed

    def _tell_times(self, before_s: float) -> None:
        """before_s: CPU seconds of this thread before it claimed."""
        device = self.pipeline.device_time
        cpu_s = {"claim": time.thread_time() - before_s, **self.pipeline.cpu_s}
        logger.info(
            "device: encoding %.3f s, starved %.3f s (%.1f %% of the time with work), idle %.1f s; CPU: %s",
            *(device.seconds["encoding"], device.seconds["starved"], 100 * device.starved_share),
            device.seconds["idle"],
            ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in cpu_s.items()),
        )

    def _release_held(self) -> None:
        held = self.leases.held()
        if not held:
            return
        try:
            released = self.store.release(held)
            logger.info(
                "%d claimed jobs given back to the head of their queues",
                len(released),
                extra={"event": "released", "jobs": len(released)},
            )
            self.monitor.observer.released(released)
        except redis.RedisError as err:
            logger.warning("claimed jobs could not be given back (%s); they return when their leases end", err)
        self.spans.left(held, "released")
        self.leases.drop(held)

    def _tick(self) -> None:
        """Each second, on the thread of the chores."""
        self.engine.log.tick()
        self.monitor.tell()
        self.promoter.round()
        self.sequels.take_up()

    def _tick_leases(self) -> None:
        """Each second, on the thread of the leases."""
        self.watchdog.tick()
        self.monitor.tick()

    # --- being idle, being an RQ worker

    def _look_after_queues(self) -> None:
        if not self.should_run_maintenance_tasks:
            return
        with errors_logged("maintenance"):
            self.run_maintenance_tasks()
        self.last_cleaned_at = now()  # type: ignore[assignment]

    def clean_registries(self) -> None:
        """As RQ's, without what runs code that a job names.

        RQ fails abandoned jobs here and calls their failure callbacks and webhooks. Ours are taken back by
        `recover.lua`; those with callbacks are left to RQ's own workers and tools.
        """
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                queue.finished_job_registry.cleanup()
                queue.failed_job_registry.cleanup()
                ReadyJobRegistry(
                    queue.name, queue.connection, job_class=ForeignJob, serializer=EmbedSerializer
                ).cleanup()
                for rate_limit in RateLimitRegistry.all(queue.connection):
                    rate_limit.cleanup()
                worker_registration.clean_worker_registry(queue)
                queue.release_maintenance_lock()

    def _sleep(self, seconds: float) -> None:
        """Sleeps, but not through a signal."""
        deadline = time.monotonic() + seconds
        while not self._stop_requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    def serialize(self) -> dict[str, Any]:
        """RQ's fields of the worker's hash, and what `embedq info` shows beside them once the model is loaded."""
        if not hasattr(self, "engine"):
            return super().serialize()
        encoder = self.engine.encoder
        return {
            **super().serialize(),
            "embedq_model": encoder.name,
            "embedq_revision": encoder.revision,
            "embedq_device": encoder.placement,
            "embedq_max_batch_tokens": self.engine.max_batch_tokens,
            **self.monitor.fields(),
        }

    def _register_again(self) -> None:
        """Redis has lost its data, or this worker's hash has expired: without it nobody sees the worker."""
        if self._stop_requested or self.birth_date is None:
            return
        logger.warning("Redis has forgotten this worker; it registers again")
        self._write_registration()

    def _write_registration(self) -> None:
        fields: Any = self.serialize()
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping=fields)
            pipeline.hset(self.key, "state", self.get_state())
            worker_registration.register(self, pipeline)
            pipeline.expire(self.key, self.worker_ttl + 60)
            pipeline.execute()

    def subscribe(self) -> None:
        """As RQ's, once, with a thread that ends in a quarter of a second instead of a whole one."""
        if self.pubsub_thread is not None:
            return
        pubsub = self.pubsub = self.connection.pubsub()
        pubsub.subscribe(
            **{
                self.pubsub_channel_name: self.handle_payload,
                keys.cancel_channel(self.name): self.commands.handle_cancel,
            }
        )
        self.pubsub_thread: Any = pubsub.run_in_thread(sleep_time=0.25, daemon=True, exception_handler=survive)

    def handle_payload(self, message: Any) -> None:
        self.commands.handle(message)

    # --- signals

    def _end_claiming(self) -> None:
        """Whatever the claiming thread waits for, and as soon as it can."""
        self._stop_requested = True
        self.monitor.health.end()
        self.waiter.wake()

    def _end_orderly(self) -> None:
        self._end_claiming()
        self.pipeline.ask_to_stop()

    def request_stop(self, signum: int, frame: Any) -> None:  # noqa: ARG002
        """RQ's handler of SIGTERM and SIGINT."""
        self.departure.ask(signum)

    def _end_hanging(self, at_work: Sequence[AtWork]) -> None:
        """Nothing can interrupt what hangs. On the thread of the leases."""
        limit_s = self.settings.encode_timeout_s
        logger.error("a micro-batch has not ended within %g s; leaving, so that a new process can go on", limit_s)
        self.departure.at_once(EXIT_HANGS, blamed(at_work, "hung", f"it did not end within {limit_s:g} s"))

    def _say_last_words(self, outcomes: Sequence[Outcome]) -> None:
        self._end_claiming()
        scheduler: Any = self.scheduler and self.scheduler._process
        if scheduler:
            scheduler.terminate()
        with contextlib.suppress(Exception):
            # Never given back: what is released here must not be claimed again.
            self._claiming.acquire(timeout=LAST_WORDS_S / 2)
            if outcomes:
                self.store.publish(outcomes)
            self._release_held()
            self.register_death()
