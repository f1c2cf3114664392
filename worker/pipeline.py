"""The stages behind the claim, on threads of their own: tokenize and plan, encode, publish; and the buffers between.

A stage that is behind holds up the one before it, back to the claims, so memory is bounded by `Bounds`. Knows threads,
order and bounds; what a stage does to a job is `Stages`'.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from embedq.worker.claims import Claim, Outcome
from embedq.worker.engine import Piece, Work
from embedq.worker.estimates import EncodeTime
from embedq.worker.planning import ReadyJob, ReadyTexts

#: What one publication takes together: it holds the server up for some 20 ms.
PUBLISH_JOBS = 512
PUBLISH_BYTES = 8 * 1024 * 1024
#: So many jobs do not wake the next stage's thread where nothing else is under way.
FEW_JOBS = 8
#: Seconds for which jobs gather at most before they are claimed, however long micro-batches take.
MAX_GATHER_S = 0.1
#: Jobs of more than a micro-batch that may be open at once. What is beyond their first micro-batch gives way to other
#: jobs and does not count as claimed ahead; without a bound a worker would begin many and finish none.
MAX_LONG_JOBS = 4
#: Threads that publish: while one waits for Redis, the other serializes.
PUBLISHERS = 2
#: Tokens that may be ready, some 30 MB with what belongs to them, while texts of the same claim are not tokenized yet.
MAX_READY_TOKENS = 2_000_000
#: Bytes of vectors that may wait to be published, beyond which nothing more is encoded.
OUTBOX_BYTES = 64 * 1024 * 1024

#: A job that has been through the encoder, or one that failed before.
Done = Work | Outcome


class Stages(Protocol):
    """What the threads do. Whatever a stage raises ends the pipeline."""

    def tokenize(self, claims: Sequence[Claim]) -> tuple[list[Work], list[Outcome], Sequence[Claim]]:
        """The jobs that can be encoded, tagged with their claims; what became of the others; and the claims that are
        for the next call, as not all of them go into memory at once."""

    def ready_job(self, work: Work) -> ReadyJob: ...

    def encode(self, batch: Sequence[Piece]) -> list[Work]:
        """The jobs that are done with this micro-batch, failed ones too."""

    def publish(self, done: Sequence[Done]) -> None:
        """Called from several threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    max_batch_tokens: int
    #: tokens that may be claimed and not encoded yet (of one job a micro-batch's worth counts, so that a long one does
    #: not hold up the claims), and jobs that may be claimed and not published
    prefetch_tokens: int
    prefetch_jobs: int
    #: seconds for which a micro-batch that is not full waits for more texts
    linger_s: float = 0.0
    #: seconds from enqueueing to the end of the encoding that micro-batches are cut for; None: always full ones
    max_latency_s: float | None = None


class DeviceTime:
    """How the encoder's thread spent its time, in seconds: `encoding`, `starved` while there was work, or `idle`."""

    State = Literal["encoding", "starved", "idle"]

    def __init__(self) -> None:
        self.seconds: dict[DeviceTime.State, float] = {"encoding": 0.0, "starved": 0.0, "idle": 0.0}
        self._state: DeviceTime.State = "idle"
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def enter(self, state: State) -> None:
        with self._lock:
            now = time.monotonic()
            self.seconds[self._state] += now - self._since
            self._state, self._since = state, now

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """While the block runs; then there is still work."""
        self.enter("encoding")
        try:
            yield
        finally:
            self.enter("starved")

    def so_far(self) -> dict[State, float]:
        """The seconds, with what has passed of the state that it is in. For any thread."""
        with self._lock:
            seconds = dict(self.seconds)
            seconds[self._state] += time.monotonic() - self._since
        return seconds

    @property
    def starved_share(self) -> float:
        """Of the time in which there was work, the share that the device waited for it."""
        with_work_s = self.seconds["encoding"] + self.seconds["starved"]
        return self.seconds["starved"] / with_work_s if with_work_s else 0.0


class Pipeline:
    """For one claiming thread, which calls the public methods.

    They raise what a stage raised, once; then the pipeline has stopped.
    """

    def __init__(self, stages: Stages, bounds: Bounds, on_failure: Callable[[], None]) -> None:
        """on_failure: called from a stage's thread once it has raised."""
        self._stages = stages
        self._bounds = bounds
        self._on_failure = on_failure
        # One lock, and a condition for each thread: waking those that have nothing to do costs as much as the work.
        lock = threading.RLock()
        self._to_feed, self._to_tokenize, self._to_encode, self._to_publish = (
            threading.Condition(lock) for _ in range(4)
        )
        self._lock = lock
        #: claims with what they are estimated to come to in tokens
        self._claimed: deque[tuple[list[Claim], int]] = deque()
        self._claimed_tokens = 0
        self._ready = ReadyTexts(bounds.max_batch_tokens)
        self._ready_since = 0.0
        #: a full micro-batch, cut while the device is busy
        self._next: list[Piece] | None = None
        self._next_tokens = 0
        self._outbox: deque[Done] = deque()
        self._outbox_bytes = 0
        self._num_jobs = 0
        #: whether only some of a claim is tokenized
        self._has_claim_begun = False
        self._is_encoding = False
        self._is_queue_empty = True
        self._is_stopping = False
        #: the threads of the stages before the last
        self._running: set[threading.Thread] = set()
        self._failure: BaseException | None = None
        self._encode_time = EncodeTime()
        self.device_time = DeviceTime()
        #: CPU seconds of each stage, once its threads have ended
        self.cpu_s: dict[str, float] = {}
        loops = [("tokenize", self._tokenize), ("encode", self._encode), *PUBLISHERS * [("publish", self._publish)]]
        self._threads = [
            threading.Thread(target=self._run, args=(name, loop), name=f"embedq-{name}", daemon=True)
            for name, loop in loops
        ]

    # --- the claiming thread's side

    def start(self) -> None:
        self._running.update(self._threads[:-PUBLISHERS])
        for thread in self._threads:
            thread.start()

    @property
    def num_jobs(self) -> int:
        """Claimed and not published."""
        return self._num_jobs

    def prefetched_jobs(self) -> int:
        """Jobs with texts that are not on the device yet. For any thread."""
        with self._lock:
            claimed = sum([len(claims) for claims, _ in self._claimed])
            return claimed + len({id(work) for work, _ in (*self._ready.items(), *(self._next or ()))})

    def prefetched_tokens(self) -> int:
        """Tokens that are not on the device yet, estimated where they are not counted yet. For any thread."""
        with self._lock:
            return self._claimed_tokens + self._ready.num_tokens + self._next_tokens

    def dead_threads(self) -> list[str]:
        """Names of those that have ended though nothing has stopped the pipeline."""
        if self._is_stopping:
            return []
        return [thread.name for thread in self._threads if thread.ident is not None and not thread.is_alive()]

    def wait_for_room(self, timeout_s: float) -> bool:
        """Until there is room for one more micro-batch; false after the timeout or when it stops."""
        with self._lock:
            self._to_feed.wait_for(lambda: self._is_stopping or self._has_room(), timeout_s)
            self._check()
            return self._has_room()

    def room_jobs(self) -> int:
        """How many more may be claimed."""
        return max(0, self._bounds.prefetch_jobs - self._num_jobs)

    def put(self, claims: list[Claim], num_tokens: int) -> None:
        """num_tokens: about what they will come to."""
        with self._lock:
            self._check()
            is_small = len(claims) <= FEW_JOBS and num_tokens <= self._bounds.max_batch_tokens
            is_quiet = is_small and self._is_quiet()
            self._claimed_tokens += num_tokens
            self._num_jobs += len(claims)
            self._clock()
            if not is_quiet:
                self._claimed.append((claims, num_tokens))
                self._to_tokenize.notify()
        if is_quiet:
            self._make_ready(claims, num_tokens)

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Until every job is published."""
        with self._lock:
            self._to_feed.wait_for(lambda: self._is_stopping or not self._num_jobs, timeout_s)
            self._check()
            return not self._num_jobs

    def wait_while_encoding(self, share: float) -> None:
        """For a share of what a full micro-batch takes, or until the device is free."""
        with self._lock:
            timeout_s = min(MAX_GATHER_S, share * self._encode_time.seconds(self._bounds.max_batch_tokens))
            self._to_feed.wait_for(lambda: self._is_stopping or not self._is_encoding, timeout_s)
            self._check()

    def queue_is_empty(self, is_empty: bool) -> None:
        """Whether jobs wait that could be claimed: a device that waits then is starved."""
        with self._lock:
            self._is_queue_empty = is_empty
            self._clock()

    def stop(self) -> None:
        """Ends the threads: what is on the device is finished and published, the rest left alone."""
        self.ask_to_stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def ask_to_stop(self) -> None:
        """As `stop`, without waiting for it. Safe in a signal handler: the lock is reentrant."""
        with self._lock:
            self._is_stopping = True
            self._wake_all()

    def check(self) -> None:
        """Raises what a stage raised."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _has_room(self) -> bool:
        bounds = self._bounds
        waiting = self._claimed_tokens + self._ready.tokens_ahead + self._next_tokens
        return (
            waiting + bounds.max_batch_tokens <= bounds.prefetch_tokens
            and self._num_jobs < bounds.prefetch_jobs
            and self._ready.num_long_jobs < MAX_LONG_JOBS
        )

    def _is_quiet(self) -> bool:
        """Whether nothing waits anywhere: then a few jobs are done sooner on the thread at hand than on the next one,
        which would have to wake up first."""
        return not (self._claimed_tokens or self._ready or self._next or self._is_encoding or self._outbox)

    def _clock(self) -> None:
        """Tells the device's clock whether there is work. The lock is held, as in all that follow."""
        if self._is_encoding:
            self.device_time.enter("encoding")
        elif self._claimed_tokens or self._ready or self._next or not self._is_queue_empty:
            self.device_time.enter("starved")
        else:
            self.device_time.enter("idle")

    def _wake_all(self) -> None:
        for condition in (self._to_feed, self._to_tokenize, self._to_encode, self._to_publish):
            condition.notify_all()

    # --- the stages' threads

    def _run(self, name: str, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as err:
            with self._lock:
                self._failure = self._failure or err
                self._is_stopping = True
                self._wake_all()
            self._on_failure()
        with self._lock:
            self._running.discard(threading.current_thread())
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.thread_time()
            self._wake_all()

    def _tokenize(self) -> None:
        """Tokenizes what is claimed, and cuts the next micro-batch where a full one is there."""
        while True:
            with self._lock:
                self._to_tokenize.wait_for(lambda: self._is_stopping or self._can_plan() or self._claimed)
                if self._is_stopping:
                    return
                if self._can_plan():
                    self._set_next(self._take(None))
                    self._to_encode.notify()
                    continue
                claims, estimate = self._claimed[0]
            self._make_ready(claims, estimate)

    def _make_ready(self, claims: list[Claim], estimate: int) -> None:
        left: Sequence[Claim] = claims
        while left:
            works, failed, left = self._stages.tokenize(left)
            jobs = [self._stages.ready_job(work) for work in works]
            with self._lock:
                self._add_ready(jobs, failed)
                self._has_claim_begun = bool(left)
                if left:
                    self._to_tokenize.wait_for(lambda: self._is_stopping or not self._holds_enough())
                    if self._is_stopping:
                        return
                else:
                    self._forget_claim(claims, estimate)

    def _add_ready(self, jobs: list[ReadyJob], failed: list[Outcome]) -> None:
        if not self._ready:
            self._ready_since = time.monotonic()
        self._ready.add(jobs)
        self._to_encode.notify()
        if failed:
            self._outbox.extend(failed)
            self._to_publish.notify()

    def _forget_claim(self, claims: list[Claim], estimate: int) -> None:
        if self._claimed and self._claimed[0][0] is claims:
            self._claimed.popleft()
        self._claimed_tokens -= estimate
        self._clock()
        # The texts may have come to fewer tokens than was thought.
        self._to_feed.notify()

    def _holds_enough(self) -> bool:
        """So many tokens that the rest of a claim is tokenized later: claims are estimated by their bytes alone."""
        return self._ready.num_tokens >= max(MAX_READY_TOKENS, self._bounds.prefetch_tokens)

    def _can_plan(self) -> bool:
        """Only full micro-batches are cut ahead: one that is not may still grow."""
        is_full = self._ready.num_tokens >= self._bounds.max_batch_tokens
        return self._next is None and is_full and self._bounds.max_latency_s is None

    def _set_next(self, batch: list[Piece]) -> None:
        self._next = batch or None
        self._next_tokens = _num_tokens(batch)

    def _take(self, max_tokens: int | None) -> list[Piece]:
        self._ready_since = time.monotonic()
        return self._ready.take(max_tokens)

    def _encode(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            began_at = time.monotonic()
            done = self._stages.encode(batch)
            took_s = time.monotonic() - began_at
            with self._lock:
                self._is_encoding = False
                self._encode_time.learn(_num_tokens(batch), took_s)
                is_quiet = len(done) <= FEW_JOBS and self._is_quiet()
                if not is_quiet:
                    self._outbox.extend(done)
                    self._outbox_bytes += sum([_num_bytes(work) for work in done])
                if any(work.failure is not None for work in done):
                    self._ready.discard(_is_wanted)
                    self._set_next([piece for piece in self._next or () if _is_wanted(piece)])
                self._clock()
                self._to_feed.notify()
                if done and not is_quiet:
                    self._to_publish.notify()
            if done and is_quiet:
                self._hand_over(done)

    def _next_batch(self) -> list[Piece] | None:
        """Waits for it; None when the pipeline stops."""
        with self._lock:
            while not self._is_stopping:
                linger_s = self._lingers_s()
                if self._outbox_bytes < OUTBOX_BYTES and linger_s is not None and linger_s <= 0:
                    batch = self._next or self._take(self._budget())
                    self._set_next([])
                    self._is_encoding = True
                    self._clock()
                    self._to_feed.notify()
                    if self._can_plan() or self._has_claim_begun:
                        self._to_tokenize.notify_all()
                    return batch
                self._to_encode.wait(linger_s if linger_s and linger_s > 0 else None)
        return None

    def _lingers_s(self) -> float | None:
        """Seconds until the next micro-batch may start: 0 at once, None if no text is there."""
        if self._next or self._ready.num_tokens >= self._bounds.max_batch_tokens:
            return 0.0
        if not self._ready:
            return None
        linger_s = self._ready_since + self._bounds.linger_s - time.monotonic()
        return min(linger_s, self._spare_s()) if self._bounds.max_latency_s is not None else linger_s

    def _spare_s(self) -> float:
        """Seconds that the most urgent text may still wait and be encoded within the latency."""
        return self._left_s() - self._encode_time.seconds(self._ready.num_tokens)

    def _budget(self) -> int | None:
        """Tokens of the next micro-batch: fewer than usual where that keeps the most urgent text within the latency.

        A text that is late already gains nothing by small batches, and those behind it would lose.
        """
        if self._bounds.max_latency_s is None:
            return None
        affordable = self._encode_time.tokens(self._left_s())
        return None if affordable is None or affordable < 1 else min(affordable, self._bounds.max_batch_tokens)

    def _left_s(self) -> float:
        """Seconds of the latency that the most urgent text has left."""
        assert self._bounds.max_latency_s is not None
        work: Work = self._ready.first()[0]
        return self._bounds.max_latency_s - work.queued_s - (time.monotonic() - work.began_at)

    def _publish(self) -> None:
        while True:
            with self._lock:
                self._to_publish.wait_for(lambda: self._outbox or (self._is_stopping and not self._running))
                if not self._outbox:
                    return
                done = self._some_done()
                self._to_encode.notify()
            self._hand_over(done)

    def _hand_over(self, done: Sequence[Done]) -> None:
        self._stages.publish(done)
        with self._lock:
            self._num_jobs -= len(done)
            self._to_feed.notify()

    def _some_done(self) -> list[Done]:
        some: list[Done] = []
        size = 0
        while self._outbox and len(some) < PUBLISH_JOBS and size < PUBLISH_BYTES:
            done = self._outbox.popleft()
            size += _num_bytes(done)
            some.append(done)
        self._outbox_bytes -= size
        return some


def _num_tokens(batch: Sequence[Piece]) -> int:
    return sum([work.tokens[place].num_tokens for work, place in batch])


def _is_wanted(piece: Piece) -> bool:
    """Not of a job that has failed by another of its texts, or was canceled."""
    return piece[0].failure is None


def _num_bytes(done: Done) -> int:
    if isinstance(done, Outcome):
        return 0
    return 0 if done.vectors is None else done.vectors.nbytes
