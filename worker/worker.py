"""The worker: claims jobs, encodes their texts in shared micro-batches, publishes the results.

An RQ worker to everyone else (`rq info`, `rq worker --worker-class`, suspend, shutdown commands); only its loop is
ours. Knows the order of the steps and the signals; Redis is in `claims`, tensors are behind `engine`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from rq import worker_registration
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.exceptions import StopRequested
from rq.logutils import setup_loghandlers
from rq.rate_limit import RateLimitRegistry
from rq.utils import now
from rq.worker import DequeueStrategy, SimpleWorker, WorkerStatus

from embedq.producer import wire
from embedq.producer.connection import is_passing
from embedq.producer.errors import ConfigurationError, JobFailedError, WireError
from embedq.producer.serializer import EmbedSerializer
from embedq.worker.callbacks import CallbackThread
from embedq.worker.claims import Claim, ClaimStore, Outcome
from embedq.worker.commands import CommandHandler, survive
from embedq.worker.encoders import load_encoder
from embedq.worker.engine import Engine, Work
from embedq.worker.interruptions import Interruptions
from embedq.worker.leases import LeaseKeeper
from embedq.worker.planning import ClaimBudget
from embedq.worker.promotion import Promoter
from embedq.worker.sequels import Sequels, errors_logged
from embedq.worker.settings import WorkerSettings
from embedq.worker.waiting import QueueWaiter

logger = logging.getLogger("embedq.worker")

T = TypeVar("T")

#: Seconds an idle worker sleeps at most before it looks after its registries and at `rq suspend`.
IDLE_S = 15.0
#: Seconds between attempts to reach a Redis that cannot serve: the first, and the longest.
RECONNECT_FIRST_S, RECONNECT_LONGEST_S = 0.5, 10.0
#: Two signals within so many seconds are one: Ctrl-C reaches a process group twice.
SAME_SIGNAL_S = 1.0
#: Seconds that a hanging Redis may cost beyond the grace.
LAST_WORDS_S = 2.0
#: Exit status after a grace that was too short.
EXIT_GRACE_OVER = 3


@dataclass(frozen=True, slots=True, eq=False)
class ActiveJob:
    """A claimed job whose texts are tokenized."""

    claim: Claim
    work: Work


class EmbedWorker(SimpleWorker):
    """An RQ worker that drains its queues in micro-batches.

    Takes RQ's arguments and `settings`, which default to the environment's (EMBEDQ_MODEL, ...). RQ's `serializer`
    argument is ignored: jobs of ours are JSON and safetensors, and pickle is never read.
    """

    # Made by `work`: a worker that `Worker.all()` only looks at has none of them.
    settings: WorkerSettings
    engine: Engine
    budget: ClaimBudget
    store: ClaimStore
    leases: LeaseKeeper
    callbacks: CallbackThread
    sequels: Sequels
    promoter: Promoter
    commands: CommandHandler
    waiter: QueueWaiter

    def __init__(self, queues: Any, *args: Any, settings: WorkerSettings | None = None, **kwargs: Any) -> None:
        kwargs["serializer"] = EmbedSerializer
        super().__init__(queues, *args, **kwargs)
        self._given_settings = settings
        self._stop_asked_at: float | None = None
        self._grace_timer: threading.Timer | None = None

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

        Raises ModelError, ConfigurationError and redis-py's errors before it has registered itself.
        """
        self.settings = self._given_settings or WorkerSettings.from_environment()
        self._dequeue_strategy = dequeue_strategy
        with contextlib.ExitStack() as on_exit:
            if with_scheduler:
                # It forks, which must come before the encoder's threads.
                self._start_scheduler(burst, logging_level, date_format, log_format)
                on_exit.callback(self._stop_scheduler)
            self._prepare()
            on_exit.callback(self.waiter.close)
            self.callbacks.start()
            if not logging.getLogger("embedq").hasHandlers():
                # `rq worker` sets up RQ's loggers alone.
                setup_loghandlers(logging_level or logging.INFO, date_format, log_format, name="embedq")
            # Before anybody can see this worker and send it a signal.
            on_exit.enter_context(self._own_signals())
            on_exit.callback(self._leave)
            self._register(logging_level, date_format, log_format)
            self.leases.start()
            return self._work(burst, max_jobs, max_idle_time) > 0

    def _prepare(self) -> None:
        self.callbacks = CallbackThread(self.settings.allow_callbacks)
        self.engine = Engine(load_encoder(self.settings), self.settings.max_batch_tokens, self.name)
        self.budget = ClaimBudget(self.engine.max_batch_tokens)
        self.store = ClaimStore(self.connection, self.name, self.settings.lease_s)
        self.sequels = Sequels(self.connection, self.queue_names(), self.callbacks, self._exc_handlers)
        self.leases = LeaseKeeper(
            self.store,
            self.queue_names(),
            self.worker_ttl + 60,
            on_abandoned=self.sequels.follow_all,
            on_forgotten=self._register_again,
            on_tick=self._tick,
        )
        self.promoter = Promoter(self.connection, self.queue_names())
        interruptions = Interruptions(self.connection, self.name, self.leases, self.sequels)
        self.commands = CommandHandler(
            on_shutdown=lambda: os.kill(os.getpid(), signal.SIGINT),
            on_stop=interruptions.stop,
            on_cancel=interruptions.cancel,
        )
        self.waiter = QueueWaiter(self.connection, self.queue_keys())

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
            self.bootstrap(logging_level, date_format, log_format)
        except ValueError as err:
            raise ConfigurationError(f"{err}; choose another --name") from err
        encoder = self.engine.encoder
        logger.info(
            "worker %s serves %s on %s: queues %s, up to %d tokens a micro-batch, leases of %g s",
            *(self.name, encoder.name, encoder.placement, ", ".join(self.queue_names())),
            *(self.engine.max_batch_tokens, self.settings.lease_s),
        )

    def _leave(self) -> None:
        """Gives back what is claimed and unregisters. A Redis that is gone does not hide why the worker ends."""
        try:
            self._release_held()
            self.leases.stop()
            self.callbacks.close(self._grace_left())
            if self.birth_date is not None:
                self.teardown()
        except redis.RedisError as err:
            logger.warning("left without a word to Redis (%s); claimed jobs return when their leases end", err)
        if self._grace_timer is not None:
            self._grace_timer.cancel()

    def _stop_scheduler(self) -> None:
        """RQ stops it only with a worker that has registered."""
        process: Any = self.scheduler and self.scheduler._process
        if process and process.is_alive():
            self.stop_scheduler()

    def _work(self, burst: bool, max_jobs: int | None, max_idle_s: float | None) -> int:
        """The loop; returns the number of jobs done."""
        done = 0
        idle_since = time.monotonic()
        reconnect_s = RECONNECT_FIRST_S
        while not self._stop_requested and (max_jobs is None or done < max_jobs):
            try:
                self._look_after_queues(burst)
                left = self.settings.max_claim_jobs if max_jobs is None else max_jobs - done
                if jobs_done := self.step(left):
                    done += jobs_done
                    idle_since = time.monotonic()
                elif burst or (max_idle_s is not None and time.monotonic() - idle_since >= max_idle_s):
                    break
                else:
                    self._idle(IDLE_S if max_idle_s is None else min(IDLE_S, max_idle_s))
                reconnect_s = RECONNECT_FIRST_S
            except StopRequested:
                break
            except redis.RedisError as err:
                if not is_passing(err):
                    raise
                logger.warning("Redis cannot serve (%s); trying again in %.1f s", err, reconnect_s)
                # A claim kept here would be renewed and never worked on.
                self._release_held()
                self._sleep(reconnect_s)
                reconnect_s = min(2 * reconnect_s, RECONNECT_LONGEST_S)
        logger.info("worker %s: %d jobs done, stopping", self.name, done)
        return done

    def step(self, max_jobs: int) -> int:
        """Claim, tokenize, plan, encode, publish; returns the number of jobs claimed.

        Told to stop, it leaves off after the micro-batch on the device; what is left is given back by `_leave`.
        """
        claims = self._claim(max_jobs)
        jobs = self._tokenize(claims)
        for batch in self.engine.plan([job.work for job in jobs]):
            if self._stop_requested:
                break
            jobs = self._drop_lost(jobs)
            self.engine.encode(batch)
            jobs = self._publish_done(jobs)
        return len(claims)

    # --- the stages

    def _claim(self, max_jobs: int) -> list[Claim]:
        queues = [queue.name for queue in self._ordered_queues]
        claimed = self.store.claim(queues, min(max_jobs, self.settings.max_claim_jobs), self.budget.max_bytes)
        if claimed.suspended:
            self.check_for_suspension(burst=False)
        if claimed.claims:
            self._state = WorkerStatus.BUSY.value  # as claim.lua told Redis
            self.leases.hold(claimed.claims)
            self.reorder_queues(next(q for q in self.queues if q.name == claimed.claims[0].queue))
        return claimed.claims

    def _tokenize(self, claims: Sequence[Claim]) -> list[ActiveJob]:
        """What cannot be read or done fails here, each job alone."""
        jobs: list[ActiveJob] = []
        failed: list[Outcome] = []
        for claim in claims:
            try:
                jobs.append(ActiveJob(claim, self.engine.tokenize(wire.decode_request(claim.data))))
            except WireError as err:
                failed.append(Outcome.failed(claim, JobFailedError(str(err), code=err.code)))
            except JobFailedError as err:
                failed.append(Outcome.failed(claim, err))
        self._publish(failed)
        self.budget.learn(
            sum(len(job.claim.data) for job in jobs),
            sum(text.num_tokens for job in jobs for text in job.work.tokens),
        )
        return jobs

    def _publish_done(self, jobs: Iterable[ActiveJob]) -> list[ActiveJob]:
        """Publishes the jobs whose last text is encoded; returns the others."""
        waiting: list[ActiveJob] = []
        outcomes: list[Outcome] = []
        for job in jobs:
            if job.work.is_done:
                outcomes.append(self._outcome(job))
            else:
                waiting.append(job)
        self._publish(outcomes)
        return waiting

    def _outcome(self, job: ActiveJob) -> Outcome:
        try:
            result = self.engine.finish(job.work, job.claim.queued_s)
        except JobFailedError as err:
            return Outcome.failed(job.claim, err)
        return Outcome.finished(job.claim, wire.encode_result(result), job.work.busy_s)

    def _publish(self, outcomes: Sequence[Outcome]) -> None:
        """Sent until Redis has it or the leases are over: what was computed is not lost to a short outage."""
        if not outcomes:
            return
        self._tell_failures([outcome for outcome in outcomes if outcome.kind != "finished"])
        with_sequel = self._until_served(lambda: self.store.publish(outcomes), f"results of {len(outcomes)} jobs")
        self.leases.drop(outcome.claim for outcome in outcomes)
        for outcome in outcomes:
            if outcome.kind != "finished":
                self.sequels.report(outcome.claim.job_id, outcome.payload)
        self.successful_job_count += sum(outcome.kind == "finished" for outcome in outcomes)
        for outcome in with_sequel:
            claim = outcome.claim
            self._until_served(functools.partial(self.sequels.follow, claim.queue, claim.job_id), "what follows a job")

    def _until_served(self, action: Callable[[], T], what: str) -> T:
        """Calls until Redis serves, for the time of a lease; then raises redis-py's error."""
        give_up_at = time.monotonic() + self.settings.lease_s
        while True:
            try:
                return action()
            except redis.RedisError as err:
                if not is_passing(err) or time.monotonic() > give_up_at:
                    raise
                logger.warning("%s must wait for Redis: %s", what, err)
                time.sleep(RECONNECT_FIRST_S)

    def _tell_failures(self, failed: Sequence[Outcome]) -> None:
        """One line however many fail at once; which ones they are is for debugging."""
        self.failed_job_count += len(failed)
        for code, number in Counter(outcome.code for outcome in failed).items():
            logger.warning("failed jobs: %d, code %s", number, code)
        for outcome in failed:
            logger.debug("job %s failed: %s", outcome.claim.job_id, outcome.code)

    def _drop_lost(self, jobs: Sequence[ActiveJob]) -> list[ActiveJob]:
        """Jobs that were canceled or taken over are encoded no further."""
        kept: list[ActiveJob] = []
        for job in jobs:
            if self.leases.is_lost(job.claim):
                job.work.failure = JobFailedError("no longer this worker's", code="lost")
                self.leases.drop([job.claim])
            else:
                kept.append(job)
        return kept

    def _release_held(self) -> None:
        held = self.leases.held()
        if not held:
            return
        try:
            released = self.store.release(held)
            logger.info("%d claimed jobs given back to the head of their queues", released)
        except redis.RedisError as err:
            logger.warning("claimed jobs could not be given back (%s); they return when their leases end", err)
        self.leases.drop(held)

    def _tick(self) -> None:
        """Each second, on the thread of the leases."""
        self.promoter.round()
        self.sequels.take_up()

    # --- being idle, being an RQ worker

    def _look_after_queues(self, burst: bool) -> None:
        if burst:
            self.check_for_suspension(burst)
        if self.should_run_maintenance_tasks:
            self._maintain()

    def _maintain(self) -> None:
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
                queue.ready_job_registry.cleanup()
                for rate_limit in RateLimitRegistry.all(queue.connection):
                    rate_limit.cleanup()
                worker_registration.clean_worker_registry(queue)
                queue.release_maintenance_lock()

    def _idle(self, seconds: float) -> None:
        if self.get_state() != WorkerStatus.IDLE:
            self.set_state(WorkerStatus.IDLE)
        self.waiter.wait(seconds)

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
        }

    def _register_again(self) -> None:
        """Redis has lost its data, or this worker's hash has expired: without it nobody sees the worker."""
        if self._stop_requested or self.birth_date is None:
            return
        logger.warning("Redis has forgotten this worker; it registers again")
        fields: Any = self.serialize()
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping=fields)
            pipeline.hset(self.key, "state", self.get_state())
            worker_registration.register(self, pipeline)
            pipeline.expire(self.key, self.worker_ttl + 60)
            pipeline.execute()

    def subscribe(self) -> None:
        """As RQ's, with a thread that ends in a quarter of a second instead of a whole one."""
        pubsub = self.pubsub = self.connection.pubsub()
        pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload})
        self.pubsub_thread: Any = pubsub.run_in_thread(sleep_time=0.25, daemon=True, exception_handler=survive)

    def handle_payload(self, message: Any) -> None:
        self.commands.handle(message)

    # --- signals

    def request_stop(self, signum: int, frame: Any) -> None:  # noqa: ARG002
        """First signal: finish the micro-batch on the device, give the rest back, exit. A second one: at once."""
        asked_at = time.monotonic()
        if self._stop_asked_at is None:
            self._stop_asked_at = asked_at
            self._stop_requested = True
            self.waiter.wake()
            self._grace_timer = threading.Timer(self.settings.grace_s, self._end_of_grace)
            self._grace_timer.daemon = True
            self._grace_timer.start()
        elif asked_at - self._stop_asked_at > SAME_SIGNAL_S:
            raise SystemExit(128 + signum)

    def _grace_left(self) -> float:
        """Seconds; all of it where no signal came."""
        passed_s = 0.0 if self._stop_asked_at is None else time.monotonic() - self._stop_asked_at
        return max(0.0, self.settings.grace_s - passed_s)

    def _end_of_grace(self) -> None:
        """The micro-batch outlasts the grace: give everything back, but wait no longer for that either."""
        logger.error("not done within the grace of %g s; leaving", self.settings.grace_s)
        last_words = threading.Thread(target=self._say_last_words, daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        scheduler: Any = self.scheduler and self.scheduler._process
        if scheduler:
            scheduler.terminate()
        logging.shutdown()
        os._exit(EXIT_GRACE_OVER)

    def _say_last_words(self) -> None:
        with contextlib.suppress(Exception):
            self._release_held()
            self.register_death()
