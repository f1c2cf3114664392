"""Any sequence of the client's and a worker's calls leaves each job in the one place that its status says."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from embedq.producer import (
    DuplicateJobError,
    EmbedQueue,
    JobFailedError,
    JobNotFoundError,
    JobStateError,
    JobStatus,
    QueueFull,
    calls,
    keys,
)
from embedq.worker.claims import ClaimStore, Outcome

TEXTS = st.sampled_from(["a", "b", "c"])
IDS = st.sampled_from(["one", "two", "three"])


class SendsTwice(EmbedQueue):
    """As after replies that were lost."""

    def _do(self, step: calls.Step) -> object:
        super()._do(step)
        return super()._do(step)


class Calls(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.queue = SendsTwice(self.url)
        self.queue._redis.flushall()
        self.store = ClaimStore(self.queue._client, "w", 300)
        self.claims: list = []
        self.known: set[str] = set()

    def teardown(self) -> None:
        self.queue.close()

    @rule(text=TEXTS, job_id=IDS, delay=st.sampled_from([0, 0, 900]), max_depth=st.none() | st.integers(1, 4))
    def enqueue(self, text: str, job_id: str, delay: int, max_depth: int | None) -> None:
        depth, is_there = self._unstarted(), self.queue.statuses([job_id])[job_id] is not None
        try:
            self.queue.enqueue_in(delay, text, job_id=job_id, max_depth=max_depth)
            self.known.add(job_id)
            assert is_there or max_depth is None or depth < max_depth
        except DuplicateJobError:
            assert job_id in self.known
        except QueueFull:
            assert max_depth is not None
            assert depth + 1 > max_depth

    @rule(texts=st.lists(TEXTS, min_size=1, max_size=4), at_front=st.booleans(), group=st.sampled_from([None, "g"]))
    def enqueue_by_content(self, texts: list[str], at_front: bool, group: str | None) -> None:
        jobs = self.queue.enqueue_many(texts, dedupe=True, at_front=at_front, group=group)
        self.known.update(job.id for job in jobs)
        assert len({job.id for job in jobs}) == len(set(texts))
        ended = {JobStatus.FAILED, JobStatus.CANCELED}
        assert not ended & set(self.queue.statuses(job.id for job in jobs).values())
        if group:
            assert {job.id for job in jobs} <= set(self.queue.group("g").job_ids())

    @rule(first=IDS, second=IDS)
    def depend(self, first: str, second: str) -> None:
        statuses = self.queue.statuses([first, second])
        try:
            job = self.queue.enqueue("after", depends_on=[first, second], job_id=f"after-{len(self.known)}")
        except JobNotFoundError:
            assert None in statuses.values()
            return
        self.known.add(job.id)
        is_free = set(statuses.values()) == {JobStatus.FINISHED}
        assert job.status() is (JobStatus.QUEUED if is_free else JobStatus.DEFERRED)
        assert is_free or job.id.encode() in self.queue._redis.smembers(keys.dependents(first))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.known)))
        before = self.queue.status(job_id)
        assert self.queue.cancel(job_id) is not before.is_terminal

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at_front=st.booleans())
    def requeue(self, data: st.DataObject, at_front: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.known)))
        with suppress(JobStateError):
            self.queue.requeue(job_id, at_front=at_front)
            assert self.queue.status(job_id) is JobStatus.QUEUED

    @rule(max_jobs=st.integers(1, 3))
    def claim(self, max_jobs: int) -> None:
        self.claims += self.store.claim(["embed"], max_jobs, 10**9).claims

    @rule(is_good=st.booleans())
    def publish(self, is_good: bool) -> None:
        reason = JobFailedError("no")
        ended = [Outcome.finished(c, b"{}", 0.0) if is_good else Outcome.failed(c, reason) for c in self.claims]
        self.store.publish(ended)
        self.claims = []

    @rule()
    def release(self) -> None:
        self.store.release(self.claims)
        self.claims = []

    @invariant()
    def each_job_is_where_its_status_says(self) -> None:
        redis = self.queue._redis
        statuses = self.queue.statuses(self.known)
        where = {
            JobStatus.QUEUED: redis.lrange(keys.queue("embed"), 0, -1),
            JobStatus.SCHEDULED: redis.zrange(keys.scheduled("embed"), 0, -1),
            JobStatus.DEFERRED: redis.zrange(keys.deferred("embed"), 0, -1),
            JobStatus.STARTED: [pair.split(b":")[0] for pair in redis.zrange(keys.started("embed"), 0, -1)],
            JobStatus.FINISHED: redis.zrange(keys.finished("embed"), 0, -1),
            JobStatus.FAILED: redis.zrange(keys.failed("embed"), 0, -1),
            JobStatus.CANCELED: redis.zrange(keys.canceled("embed"), 0, -1),
        }
        for status, found in where.items():
            wanted = sorted(job_id for job_id, its in statuses.items() if its is status)
            assert sorted(entry.decode() for entry in found) == wanted, status

    def _unstarted(self) -> int:
        redis = self.queue._redis
        return int(self.queue.depth() + redis.zcard(keys.scheduled("embed")) + redis.zcard(keys.deferred("embed")))


@pytest.fixture
def machine(each_url: str) -> type[Calls]:
    return type("CallsThere", (Calls,), {"url": each_url})


def test_each_job_is_where_its_status_says_whatever_is_called_and_sent_twice(machine: type[Calls]) -> None:
    how = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(machine, settings=how)
