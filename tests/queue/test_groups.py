"""Groups: RQ's own, counted and canceled together."""

from __future__ import annotations

import pytest
from rq.group import Group
from rq.job import Job

from embedq.producer import EmbedQueue, EmbedSerializer, InvalidOptionError, JobStatus, groups, keys
from tests.conftest import Drain


def test_rq_knows_our_group_and_its_jobs(each_url: str) -> None:
    with EmbedQueue(each_url) as queue:
        jobs = [*queue.enqueue_many(["a", "b"], group="nightly"), queue.enqueue("c", group="nightly")]
        queue.enqueue("alone")
        theirs = Group.fetch("nightly", connection=queue._client)
        assert [group.name for group in Group.all(connection=queue._client)] == ["nightly"]
        theirs.cleanup()
        assert queue._redis.smembers(theirs.key) == {job.id.encode() for job in jobs}
        seen = Job.fetch(jobs[0].id, connection=queue._client, serializer=EmbedSerializer)
        assert seen.group_id == "nightly"


def test_a_group_counts_its_jobs_by_status(queue: EmbedQueue, drain: Drain) -> None:
    done = queue.enqueue_many(["a", "b", "c"], group="g")
    bad = queue.enqueue("d", dimensions=99, group="g")
    drain()
    queue.enqueue_in(60, "e", group="g")
    waiting = queue.enqueue("f", group="g")
    gone = queue.enqueue("g", group="g")
    queue._redis.delete(keys.job(gone.id))
    group = queue.group("g")
    assert group.counts() == {
        JobStatus.FINISHED: 3,
        JobStatus.FAILED: 1,
        JobStatus.SCHEDULED: 1,
        JobStatus.QUEUED: 1,
    }
    assert len(group.job_ids()) == 7
    results = group.results(timeout=0)
    assert {job.id for job in done} == {job_id for job_id, outcome in results.items() if hasattr(outcome, "vectors")}
    assert type(results[bad.id]).__name__ == "JobFailedError"
    assert group.cancel() == 2
    assert waiting.status() is JobStatus.CANCELED
    assert queue.depth() == 1  # the id without a job
    assert group.cancel() == 0
    assert repr(group) == "JobGroup('g')"


def test_a_large_group_is_read_in_pages(queue: EmbedQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = queue.enqueue_many(list(map(str, range(3000))), group="large")
    monkeypatch.setattr(groups, "PAGE_IDS", 100)
    queue._redis.config_resetstat()
    assert queue.group("large").counts() == {JobStatus.QUEUED: 3000}
    assert 20 <= queue._redis.info("commandstats")["cmdstat_sscan"]["calls"] <= 60
    assert set(queue.group("large").job_ids()) == {job.id for job in jobs}


def test_a_job_of_the_same_content_joins_the_second_group_too(queue: EmbedQueue) -> None:
    one = queue.enqueue("a", dedupe=True, group="one")
    assert queue.enqueue("a", dedupe=True, group="two") == one
    assert queue.group("one").job_ids() == queue.group("two").job_ids() == [one.id]


def test_a_name_that_nobody_used_has_no_jobs(queue: EmbedQueue) -> None:
    nobody = queue.group("nobody")
    assert (nobody.counts(), nobody.job_ids(), nobody.results(), nobody.cancel()) == ({}, [], {}, 0)
    for name in ("", "x" * 257, 7, "half \ud83d"):
        with pytest.raises(InvalidOptionError, match="group must be a name"):
            queue.group(name)  # type: ignore[arg-type]
