"""A producer's process: `python -m tests.chaos.produce URL SEED STARTED_AT NAME KIND PER_S GROUP JOURNAL`.

Does what the plan gives its producer, writes down what it means to do before and what came of it after, and tries again
with the same job ids whenever Redis did not answer: that nothing is lost or doubled by it is what clients are promised.
Killed and started again it goes on where its journal ends. SIGTERM: it ends once what is under way has been answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from embedq.producer import AsyncEmbedQueue, EmbedQueue
from embedq.producer.errors import (
    DuplicateJobError,
    EmbedqError,
    JobCanceledError,
    JobFailedError,
    JobNotFoundError,
    PartialEnqueueError,
)
from tests.chaos.actions import Action, actions
from tests.chaos.draws import Job, parse_id
from tests.chaos.journal import Journal, JournalReader
from tests.chaos.plan import Producer

#: Seconds between two attempts.
AGAIN_S = 0.2
#: Actions that the asyncio client has under way at a time.
MAX_UNDER_WAY = 64
#: Of the asyncio client's jobs, one in so many is waited for; for so long at a time.
AWAITED, AWAIT_S = 4, 30.0
#: Of the awaited, more than this at a time are not waited for.
MAX_AWAITED = 200


class Diary:
    """A journal, and what an earlier process had done by it."""

    def __init__(self, path: Path) -> None:
        self._done = {record["key"] for record in JournalReader(path).read() if record["what"] == "done"}
        self._journal = Journal(path)

    def is_done(self, action: Action) -> bool:
        return action.key in self._done

    def mean(self, action: Action) -> None:
        self._journal.write(what="meant", key=action.key, kind=action.kind, ids=[job.id for job in action.jobs])

    def fail(self, action: Action, err: EmbedqError) -> None:
        self._journal.write(what="raised", key=action.key, kind=action.kind, error=err.code, ids=_ids(action))

    def finish(self, action: Action, reply: object) -> None:
        self._journal.write(what="done", key=action.key, kind=action.kind, ids=_ids(action), reply=reply)

    def tell_result(self, job_id: str, verdict: str) -> None:
        self._journal.write(what="result", key=f"result {job_id}", kind="result", ids=[job_id], reply=verdict)


def _ids(action: Action) -> list[str]:
    return [job.id for job in action.jobs]


def _rival(job: Job) -> list[str]:
    return [*job.texts, "what another client would have under this id"]


def _keywords(job: Job) -> dict[str, Any]:
    return {**job.keywords, "depends_on": job.depends_on} if job.depends_on else dict(job.keywords)


def is_worth_trying_again(err: EmbedqError) -> bool:
    return err.retryable or isinstance(err, PartialEnqueueError)


def digest(vectors: Any) -> str:
    """Of the numbers, their type and shape."""
    return hashlib.blake2b(
        f"{vectors.dtype.str}{vectors.shape}".encode() + vectors.tobytes(), digest_size=12
    ).hexdigest()


def verdict_of(outcome: object) -> str:
    """What a client was told of a job, in a word."""
    if isinstance(outcome, JobFailedError):
        return f"failed {outcome.code} {outcome.text_index}"
    if isinstance(outcome, JobCanceledError):
        return "canceled"
    if isinstance(outcome, JobNotFoundError):
        return "gone"
    return f"finished {digest(outcome.vectors)}"  # type: ignore[attr-defined]


class SyncProducer:
    """One action after the other."""

    def __init__(self, queue: EmbedQueue, diary: Diary, stop: threading.Event) -> None:
        self._queue = queue
        self._diary = diary
        self._stop = stop

    def run(self, seed: int, producer: Producer, started_at: float) -> None:
        for action in actions(seed, producer):
            if self._stop.wait(max(0.0, started_at + action.at_s - time.time())):
                return
            if not self._diary.is_done(action):
                self._do_at_last(action)

    def _do_at_last(self, action: Action) -> None:
        self._diary.mean(action)
        while True:
            try:
                reply = self._do(action)
            except EmbedqError as err:
                if not is_worth_trying_again(err):
                    raise
                self._diary.fail(action, err)
                time.sleep(AGAIN_S)
            else:
                self._diary.finish(action, reply)
                return

    def _do(self, action: Action) -> object:
        try:
            return self._call(action)
        except DuplicateJobError:
            return "refused"

    def _call(self, action: Action) -> object:
        job = action.jobs[0]
        if action.kind == "cancel":
            try:
                return self._queue.cancel(job.id)
            except JobNotFoundError:
                return "gone"
        if action.kind == "rival":
            self._queue.enqueue(_rival(job), job_id=job.id, **job.keywords)
        elif len(action.jobs) > 1:
            texts = [each.texts[0] for each in action.jobs]
            self._queue.enqueue_many(texts, job_ids=_ids(action), **job.keywords)
        elif job.delay_s and action.kind == "enqueue":
            self._queue.enqueue_in(job.delay_s, job.texts, job_id=job.id, **job.keywords)
        else:
            self._queue.enqueue(job.texts, job_id=job.id, **_keywords(job))
        return "accepted"


class AsyncProducer:
    """Many actions at a time; those of one job in their order."""

    def __init__(self, queue: AsyncEmbedQueue, diary: Diary) -> None:
        self._queue = queue
        self._diary = diary
        self._stop = asyncio.Event()
        self._under_way = asyncio.Semaphore(MAX_UNDER_WAY)
        #: the last action of each job that is not done
        self._last: dict[str, asyncio.Task[None]] = {}
        self._awaited: set[asyncio.Task[None]] = set()

    async def run(self, seed: int, producer: Producer, started_at: float) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        async with asyncio.TaskGroup() as group:
            for action in actions(seed, producer):
                if await self._is_stopped(max(0.0, started_at + action.at_s - time.time())):
                    break
                if self._diary.is_done(action):
                    continue
                await self._under_way.acquire()
                job = action.jobs[0]
                before = [self._last[name] for name in (job.id, job.depends_on) if name in self._last]
                self._last[job.id] = group.create_task(self._do_at_last(action, before))
        for task in self._awaited:
            task.cancel()
        await asyncio.gather(*self._awaited, return_exceptions=True)

    async def _is_stopped(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self._stop.wait()
        except TimeoutError:
            pass
        return self._stop.is_set()

    async def _do_at_last(self, action: Action, before: list[asyncio.Task[None]]) -> None:
        try:
            for task in before:
                await task
            self._diary.mean(action)
            while not await self._try(action):
                await asyncio.sleep(AGAIN_S)
            self._expect(action)
        finally:
            self._under_way.release()
            job_id = action.jobs[0].id
            if self._last.get(job_id) is asyncio.current_task():
                del self._last[job_id]

    async def _try(self, action: Action) -> bool:
        try:
            reply = await self._do(action)
        except EmbedqError as err:
            if not is_worth_trying_again(err):
                raise
            self._diary.fail(action, err)
            return False
        self._diary.finish(action, reply)
        return True

    async def _do(self, action: Action) -> object:
        try:
            return await self._call(action)
        except DuplicateJobError:
            return "refused"

    async def _call(self, action: Action) -> object:
        job = action.jobs[0]
        if action.kind == "cancel":
            try:
                return await self._queue.cancel(job.id)
            except JobNotFoundError:
                return "gone"
        if action.kind == "rival":
            await self._queue.enqueue(_rival(job), job_id=job.id, **job.keywords)
        elif job.delay_s and action.kind == "enqueue":
            await self._queue.enqueue_in(job.delay_s, job.texts, job_id=job.id, **job.keywords)
        else:
            await self._queue.enqueue(job.texts, job_id=job.id, **_keywords(job))
        return "accepted"

    def _expect(self, action: Action) -> None:
        number = parse_id(action.jobs[0].id)[1]
        if action.kind == "enqueue" and number % AWAITED == 0 and len(self._awaited) < MAX_AWAITED:
            task = asyncio.create_task(self._await_result(action.jobs[0].id))
            self._awaited.add(task)
            task.add_done_callback(self._awaited.discard)

    async def _await_result(self, job_id: str) -> None:
        while True:
            try:
                outcome: object = await self._queue.result(job_id, timeout=AWAIT_S)
            except (JobFailedError, JobCanceledError, JobNotFoundError) as err:
                outcome = err
            except EmbedqError as err:
                if not err.retryable:
                    raise
                await asyncio.sleep(AGAIN_S)
                continue
            self._diary.tell_result(job_id, verdict_of(outcome))
            return


async def _run_async(url: str, seed: int, producer: Producer, started_at: float, diary: Diary) -> None:
    async with AsyncEmbedQueue(url) as queue:
        await AsyncProducer(queue, diary).run(seed, producer, started_at)


def main(arguments: list[str]) -> None:
    url, seed, started_at, name, kind, per_s, group, journal = arguments
    producer = Producer(name, kind, float(per_s), int(group))  # type: ignore[arg-type]
    diary = Diary(Path(journal))
    if kind == "async":
        asyncio.run(_run_async(url, int(seed), producer, float(started_at), diary))
        return
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with EmbedQueue(url) as queue:
        SyncProducer(queue, diary, stop).run(int(seed), producer, float(started_at))


if __name__ == "__main__":
    main(sys.argv[1:])
