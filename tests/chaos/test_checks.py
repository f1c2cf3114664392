"""The chaos suite's checks, each against what it is there to find, planted by hand."""

from __future__ import annotations

import base64
import dataclasses
import sys
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
import redis

from embedq.producer import EmbedQueue, keys, wire
from embedq.producer.connection import connect
from embedq.producer.errors import JobFailedError
from embedq.worker import processes
from embedq.worker.claims import ClaimStore, Outcome
from tests.chaos.audit import VANISH_S, Audit
from tests.chaos.checks import MODEL, Deaths, Seen, check_ended, check_recoveries
from tests.chaos.draws import FEW_RETRIES, Job, Poison, draw_job
from tests.chaos.history import history
from tests.chaos.journal import Journal, JournalReader
from tests.chaos.ledger import Ledger
from tests.chaos.plan import plan
from tests.chaos.recovery import Recoveries, Recovery
from tests.chaos.world import World
from tests.conftest import Drain, until

SEED = 7
NUM_JOBS = 6
NO_DEATHS = Deaths(0, 0)


class Scene:
    """A few jobs of a plan, enqueued and written down as a producer would, and the audit."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.redis: redis.Redis = connect(url)
        self.jobs = list(islice(_plain_jobs(), NUM_JOBS))
        self._path = folder / "sync1.journal"
        self._journal = Journal(self._path)
        self.audit = Audit(self.redis, Ledger(plan(SEED, 60)), [JournalReader(self._path)], lambda *_: NO_DEATHS)
        with EmbedQueue(url) as queue:
            for job in self.jobs:
                self.write("enqueue", "meant", job)
                queue.enqueue(job.texts, job_id=job.id, **job.keywords)
                self.write("enqueue", "done", job, reply="accepted")

    def write(self, kind: str, what: str, job: Job, **more: object) -> None:
        self._journal.write(what=what, key=f"{kind} {job.id}", kind=kind, ids=[job.id], **more)

    def found(self) -> set[tuple[str, str]]:
        """What the audit says at its end: kinds, and of what."""
        self.audit.close()
        return {(violation.kind, violation.job_id) for violation in self.audit.violations}

    def close(self) -> None:
        self._journal.close()
        self.redis.close()


def _plain_jobs() -> Iterator[Job]:
    for number in count():
        job = draw_job(SEED, "sync1", number)
        if job.poison is None and job.canceled_after_s is None and not job.delay_s and job.depends_on is None:
            yield job


@pytest.fixture
def scene(url: str, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(url, tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def ended(scene: Scene, drain: Drain) -> Scene:
    """The jobs have finished; nobody has looked yet."""
    drain(model=MODEL)
    return scene


def test_nothing_is_found_where_nothing_is_wrong(ended: Scene) -> None:
    ended.audit.round()
    assert ended.found() == set()
    assert ended.audit.ledger.ended == {"finished": NUM_JOBS}


def test_a_job_that_never_ends_is_lost(scene: Scene) -> None:
    assert scene.found() >= {("lost", job.id) for job in scene.jobs}


def test_a_job_that_is_gone_is_lost(ended: Scene) -> None:
    ended.redis.delete(keys.job(ended.jobs[2].id))
    ended.audit.round()
    ended.audit.round()
    assert ("lost", ended.jobs[2].id) in ended.found()


def test_an_ended_job_without_its_result_is_lost(ended: Scene) -> None:
    ended.redis.delete(keys.results(ended.jobs[0].id))
    assert ("lost", ended.jobs[0].id) in ended.found()


@pytest.mark.parametrize("was_seen", [False, True])
def test_a_second_result_is_a_duplicate_before_and_after_the_first_was_seen(ended: Scene, was_seen: bool) -> None:
    if was_seen:
        ended.audit.round()
    [(_, entry)] = ended.redis.xrange(keys.results(ended.jobs[1].id))
    ended.redis.xadd(keys.results(ended.jobs[1].id), entry)
    assert ended.found() == {("duplicated", ended.jobs[1].id)}


def test_a_finished_job_that_waits_again_is_a_duplicate(ended: Scene) -> None:
    ended.audit.round()
    ended.redis.rpush(keys.queue("embed"), ended.jobs[1].id)
    assert ended.found() == {
        ("duplicated", ended.jobs[1].id),
        ("stray", ended.jobs[1].id),
        ("stray", keys.queue("embed")),
    }


def test_a_status_that_changes_after_the_end_is_a_duplicate(ended: Scene) -> None:
    ended.audit.round()
    ended.redis.hset(keys.job(ended.jobs[3].id), "status", "started")
    assert ended.found() == {("duplicated", ended.jobs[3].id)}


def test_a_job_that_two_workers_hold_or_that_waits_twice_is_a_duplicate(scene: Scene) -> None:
    first, second = scene.jobs[:2]
    scene.redis.zadd(keys.started("embed"), {f"{first.id}:a-1": 2e9, f"{first.id}:b-1": 2e9})
    scene.redis.rpush(keys.queue("embed"), second.id)
    scene.audit.round()
    found = {(violation.kind, violation.job_id) for violation in scene.audit.violations}
    assert found == {("duplicated", first.id), ("duplicated", second.id)}


def test_a_vector_that_differs_by_one_bit_is_wrong(ended: Scene) -> None:
    stream = keys.results(ended.jobs[0].id)
    [(_, entry)] = ended.redis.xrange(stream)
    blob = bytearray(base64.b64decode(entry[b"return_value"]))
    blob[-4] ^= 1  # the lowest bit of the last number
    entry[b"return_value"] = base64.b64encode(blob)
    ended.redis.xtrim(stream, maxlen=0)
    ended.redis.xadd(stream, entry)
    assert ended.found() == {("wrong", ended.jobs[0].id)}


def test_the_vectors_of_other_texts_are_wrong(ended: Scene) -> None:
    ended.redis.copy(keys.results(ended.jobs[0].id), keys.results(ended.jobs[1].id), replace=True)
    assert ("wrong", ended.jobs[1].id) in ended.found()


def test_a_result_of_a_job_that_was_canceled_is_wrong(ended: Scene) -> None:
    ended.write("cancel", "meant", ended.jobs[0])
    ended.write("cancel", "done", ended.jobs[0], reply=True)
    assert ended.found() == {("wrong", ended.jobs[0].id)}


def test_a_canceled_job_that_nobody_canceled_is_wrong(scene: Scene, drain: Drain) -> None:
    with EmbedQueue(scene.url) as queue:
        queue.cancel(scene.jobs[0].id)
    drain(model=MODEL)
    assert scene.found() == {("wrong", scene.jobs[0].id)}


def test_a_client_that_was_told_something_else_is_wrong(ended: Scene) -> None:
    ended.write("result", "result", ended.jobs[0], reply="finished 0123")
    ended.write("result", "result", ended.jobs[1], reply="gone")
    assert ended.found() == {("wrong", ended.jobs[0].id)}


def test_an_id_that_is_given_to_another_request_or_refused_to_its_own_is_wrong(ended: Scene) -> None:
    ended.write("rival", "done", ended.jobs[3], reply="accepted")
    ended.write("double", "done", ended.jobs[4], reply="refused")
    ended.write("rival", "done", ended.jobs[5], reply="refused")
    assert ended.found() == {("wrong", ended.jobs[3].id), ("wrong", ended.jobs[4].id)}


@pytest.mark.parametrize(
    "key",
    [
        keys.results("sync1-0") + ":e-1",
        keys.execution("sync1-0", "e-1"),
        keys.worker_executions("w0-1"),
        keys.job("nobody"),
        keys.vector("00"),
        "something else",
    ],
)
def test_a_key_that_nothing_explains_is_a_stray(ended: Scene, key: str) -> None:
    ended.redis.set(key, 1, ex=100)
    assert ended.found() == {("stray", key)}


def test_an_ended_job_that_never_expires_is_a_stray(ended: Scene) -> None:
    ended.redis.persist(keys.results(ended.jobs[0].id))
    assert ended.found() == {("stray", keys.results(ended.jobs[0].id))}


def test_what_outlives_its_time_is_a_stray(ended: Scene) -> None:
    ended.audit.round()
    job = ended.jobs[0]
    account = ended.audit.ledger.accounts[job.id]
    account.ended_at -= job.result_ttl + VANISH_S + 1
    account.enqueued_at = 0
    ended.audit.round()
    assert [(violation.kind, violation.job_id) for violation in ended.audit.violations] == [("stray", job.id)]


def test_what_is_left_in_lists_and_registries_is_a_stray(ended: Scene) -> None:
    ended.redis.zadd(keys.sequels("embed"), {"a": 1})
    ended.redis.rpush(f"{keys.queue('embed')}:intermediate", "b")
    ended.redis.zadd(keys.failed("embed"), {"c": 2e9})
    assert ended.found() >= {("stray", "a"), ("stray", "b"), ("stray", "c")}


def test_a_finished_job_that_is_not_in_the_registry_is_lost(ended: Scene) -> None:
    ended.redis.zrem(keys.finished("embed"), ended.jobs[0].id)
    assert ended.found() == {("lost", ended.jobs[0].id)}


# --- failures


def _failed(failure: JobFailedError) -> Seen:
    entry = {b"type": b"2", b"exc_string": wire.encode_exc_string(failure)}
    return Seen(b"failed", time.time(), 1, [(b"1-0", entry)], has_executions=False)


def _kinds(job: Job, failure: JobFailedError, deaths: Deaths = NO_DEATHS) -> list[str]:
    return [each.kind for each in check_ended(job, _failed(failure), deaths)]


def _job(poison: Poison | None, *, index: int | None = None, retries: int = 1) -> Job:
    keywords = {"retries": retries, "result_ttl": 60, "failure_ttl": 60}
    return Job("sync1-0", ("a", "b"), keywords, poison, index)


def test_an_innocent_job_may_fail_only_by_more_deaths_than_it_has_retries() -> None:
    innocent = _job(None, retries=FEW_RETRIES)
    assert _kinds(innocent, JobFailedError("?", code="encode_failed"), Deaths(9, 9)) == ["lost"]
    assert _kinds(innocent, JobFailedError.abandoned(), Deaths(FEW_RETRIES, 1)) == ["lost"]
    assert _kinds(innocent, JobFailedError.abandoned(), Deaths(FEW_RETRIES + 1, 1)) == []
    assert _kinds(innocent, JobFailedError("?", code="hung"), Deaths(FEW_RETRIES, 1)) == []


def test_poison_fails_with_its_code_and_names_its_text() -> None:
    poison = _job("raise", index=1)
    assert _kinds(poison, JobFailedError("?", code="encode_failed", text_index=1)) == []
    assert _kinds(poison, JobFailedError("?", code="internal", text_index=1)) == ["wrong"]
    assert _kinds(poison, JobFailedError("?", code="encode_failed", text_index=0)) == ["wrong"]
    assert _kinds(poison, JobFailedError("?", code="encode_failed")) == ["wrong"]


def test_a_job_that_ends_processes_names_its_text_once_it_was_tried_alone() -> None:
    twice, once = _job("abort", index=1), _job("abort", index=1, retries=0)
    assert _kinds(twice, JobFailedError.abandoned(1), Deaths(2, 0)) == []
    assert _kinds(twice, JobFailedError.abandoned(), Deaths(2, 0)) == ["wrong"]
    assert _kinds(twice, JobFailedError.abandoned(0), Deaths(2, 0)) == ["wrong"]
    assert _kinds(twice, JobFailedError.abandoned(0), Deaths(3, 1)) == []
    assert _kinds(once, JobFailedError.abandoned(), Deaths(1, 0)) == []


def test_poison_that_finishes_is_wrong(ended: Scene) -> None:
    [(entry_id, entry)] = ended.redis.xrange(keys.results(ended.jobs[0].id))
    seen = Seen(b"finished", time.time(), 60, [(entry_id, entry)], has_executions=False)
    poisoned = dataclasses.replace(ended.jobs[0], poison="nan", poison_index=0)
    kinds = [each.kind for each in check_ended(poisoned, seen, NO_DEATHS)]
    assert kinds == ["wrong"]


def test_a_result_of_another_kind_than_the_status_is_wrong() -> None:
    seen = dataclasses.replace(_failed(JobFailedError("?")), status=b"finished")
    assert [each.kind for each in check_ended(_job(None), seen, NO_DEATHS)] == ["wrong"]


# --- processes


def test_a_recovery_is_slow_only_where_nothing_else_was_in_its_way() -> None:
    slow = Recovery("w0-1", 0.0, num_jobs=3, back_s=11.0, took_s=12.0, is_undisturbed=True, is_calm=True)
    claimed_late = dataclasses.replace(slow, back_s=6.0)
    others = [
        dataclasses.replace(slow, is_undisturbed=False, is_calm=False),
        dataclasses.replace(claimed_late, is_calm=False),
        dataclasses.replace(slow, back_s=6.0, took_s=9.0),
    ]
    assert [each.kind for each in check_recoveries([slow, claimed_late])] == ["slow", "slow"]
    assert list(check_recoveries(others)) == []


def test_a_worker_that_ends_by_itself_is_told_of(tmp_path: Path) -> None:
    world = World(dataclasses.replace(plan(SEED, 60), producers=()), tmp_path)
    world.is_ending = True
    for worker, status in zip(world.workers, (0, 1, 77), strict=True):
        worker.process = processes.start([sys.executable, "-c", f"exit({status})"], tmp_path / f"{worker.name}.log")
        worker.process.wait()
    world.tick()
    assert [complaint.partition(":")[0] for complaint in world.complaints] == ["w1-0 ended with status 1"]


def test_a_process_that_is_left_is_told_of(tmp_path: Path) -> None:
    world = World(plan(SEED, 60), tmp_path)
    world.url = f"unix://{tmp_path}/redis.sock"
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path / "a.journal")]
    left = processes.start(command, tmp_path / "log")
    try:
        world.look_for_left_processes()
    finally:
        processes.stop(left, 5)
    assert [complaint.split()[0] for complaint in world.complaints] == [str(left.pid)]


def test_a_violations_history_has_what_its_producer_wrote_and_what_happened(ended: Scene, tmp_path: Path) -> None:
    ended.redis.delete(keys.results(ended.jobs[0].id))
    (tmp_path / "events.jsonl").write_text(f'{{"at": {time.time()}, "what": "killed", "who": "w0-1"}}\n')
    ended.found()
    told = history(ended.audit.violations[0], ended.audit.ledger, tmp_path)
    assert "enqueue done" in told
    assert "killed w0-1" in told


def test_a_recovery_is_over_when_the_last_job_is_in_other_hands(scene: Scene) -> None:
    dead, alive = ClaimStore(scene.redis, "dead", 1.0), ClaimStore(scene.redis, "alive", 60.0)
    held = dead.claim(["embed"], NUM_JOBS, 1_000_000).claims
    dead.publish([Outcome.failed(held[0], JobFailedError("?"))])
    with Recoveries(scene.redis, lambda *_: True, lambda *_: False) as recoveries:
        recoveries.killed("dead")
        until(lambda: alive.recover("embed").retried == NUM_JOBS - 1)
        assert recoveries.done == []
        alive.claim(["embed"], NUM_JOBS, 1_000_000)
        until(lambda: recoveries.done)
    [recovery] = recoveries.done
    assert (recovery.worker, recovery.num_jobs) == ("dead", NUM_JOBS - 1)
    assert (recovery.is_undisturbed, recovery.is_calm) == (True, False)
    assert recovery.back_s is not None
    assert recovery.took_s is not None
    assert 0.5 < recovery.back_s <= recovery.took_s
