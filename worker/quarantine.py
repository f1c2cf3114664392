"""Jobs that were tried before: a worker has died with them in hand, or they failed in a way that may pass.

One of them may be what kills workers. So they are done apart from first attempts, with nothing else in flight: in
micro-batches of their own, and whoever is on its last attempt all alone, text by text, so that no other job pays for
it and its failure names the text. Each is noted in Redis as begun before anything looks at its texts: a death costs an
attempt only those that had begun. Knows
the order of these steps; what they do is the stages'.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence

from embedq.producer.errors import JobFailedError
from embedq.worker.claims import Claim, ClaimStore
from embedq.worker.engine import Work
from embedq.worker.pipeline import DeviceTime
from embedq.worker.planning import ReadyJob, ReadyTexts
from embedq.worker.stages import WorkerStages

#: Jobs that begin together while they have attempts left.
GROUP_JOBS = 128


class Quarantine:
    """For the claiming thread, while the pipeline is empty."""

    def __init__(
        self, stages: WorkerStages, store: ClaimStore, max_batch_tokens: int, device_time: DeviceTime | None = None
    ) -> None:
        self._stages = stages
        self._store = store
        self._max_batch_tokens = max_batch_tokens
        self._device_time = device_time or DeviceTime()
        self._claims: deque[Claim] = deque()

    def __len__(self) -> int:
        return len(self._claims)

    def put(self, claims: Sequence[Claim]) -> None:
        self._claims.extend(claims)

    def work(self, is_stopping: Callable[[], bool]) -> None:
        """Until none is left, or the worker stops. Raises redis-py's errors; then the rest waits for the next call.

        On a thread of its own: a signal has no effect while the main thread is inside of a library.
        """
        raised: list[BaseException] = []

        def work() -> None:
            try:
                self._work(is_stopping)
            except BaseException as err:
                raised.append(err)

        thread = threading.Thread(target=work, name="embedq-quarantine", daemon=True)
        thread.start()
        thread.join()
        self._device_time.enter("idle")
        if raised:
            raise raised[0]

    def _work(self, is_stopping: Callable[[], bool]) -> None:
        while self._claims and not is_stopping():
            group = self._next_group()
            if group[0].is_last:
                self._try_alone(group[0], is_stopping)
            else:
                self._try_together(group, is_stopping)
            for _ in group:
                self._claims.popleft()

    def _next_group(self) -> list[Claim]:
        """The first one if it is on its last attempt, else those before the next that is."""
        before_last = itertools.takewhile(lambda claim: not claim.is_last, self._claims)
        return list(itertools.islice(before_last, GROUP_JOBS)) or [self._claims[0]]

    def _try_together(self, group: Sequence[Claim], is_stopping: Callable[[], bool]) -> None:
        claims: Sequence[Claim] = self._begin(group, None)
        while claims and not is_stopping():
            works, failed, claims = self._stages.tokenize(claims)
            self._stages.publish(failed)
            self._encode([self._stages.ready_job(work) for work in works], is_stopping)

    def _try_alone(self, claim: Claim, is_stopping: Callable[[], bool]) -> None:
        # Noted before the payload is even decompressed: a death that nobody is charged with would repeat for ever.
        if not self._begin([claim], None):
            return
        requests = self._stages.one_by_one(claim)
        for index, request in enumerate(requests):
            if is_stopping() or not self._begin([claim], index):
                return
            self._stages.try_tokenizing(claim, index, request)
        for work in self._tokenize(self._begin([claim], 0 if len(requests) == 1 else None)):
            for index in range(len(work.num_tokens)):
                if is_stopping() or work.failure is not None or not self._begin([claim], index):
                    return
                self._encode([_ready_text(work, index)], is_stopping)

    def _begin(self, claims: Sequence[Claim], index: int | None) -> list[Claim]:
        """Notes that they begin, and what they fail with if the worker dies of text `index`; those still held."""
        lost = self._store.begin([(claim, JobFailedError.abandoned(index)) for claim in claims])
        self._stages.leave(lost)
        return [claim for claim in claims if claim not in lost]

    def _tokenize(self, claims: Sequence[Claim]) -> list[Work]:
        """One job's texts, if it is still held and can be read."""
        works, failed = self._stages.tokenize_all(claims)
        self._stages.publish(failed)
        return works

    def _encode(self, jobs: Sequence[ReadyJob], is_stopping: Callable[[], bool]) -> None:
        ready = ReadyTexts(self._max_batch_tokens)
        ready.add(jobs)
        while ready and not is_stopping():
            with self._device_time.encoding():
                done = self._stages.encode(ready.take())
            self._stages.publish(done)


def _ready_text(work: Work, index: int) -> ReadyJob:
    pieces = [(work, place) for place, text in enumerate(work.texts) if text == index]
    return ReadyJob(pieces, [work.tokens[place].num_tokens for _, place in pieces])
