"""The scripts on a real server beside the model, call by call: what stands in Redis is what the model says.

Workers here have no sense: any claim that was ever told is begun, published, released and renewed at any time, in any
mixture, whether its worker has died, slept through its lease or done it all before. Leases run out by their score.

`PROTOCOL_EXAMPLES=2000 python -m pytest --timeout 0 tests/queue/test_protocol_stateful.py` looks for longer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from embedq.producer import EmbedQueue, JobFailedError, JobStateError, calls, keys, scripts, wire
from embedq.producer.settings import FAILURE_TTL_S
from embedq.worker import promotion
from embedq.worker.claims import STAGE_FROM_BYTES, Claim, ClaimStore, Outcome, Recovered
from tests.queue import protocol_model, protocol_view
from tests.queue.protocol_model import Execution, Protocol, State
from tests.queue.protocol_view import JOB_IDS, QUEUE

EXAMPLES = int(os.environ.get("PROTOCOL_EXAMPLES", "80"))
STEPS = 40
#: Claims that are remembered, the latest: what stale workers still have in hand.
REMEMBERED = 8
LEASE_S = 300.0
#: Seconds to the retries of a delayed job: it is due once its score is set to 0.
DELAY_S = 900
PUSHES: dict[bool, protocol_model.Push] = {False: "RPUSH", True: "LPUSH"}

WORKERS = st.sampled_from(["w1", "w2", "w3"])
OUTCOMES = st.sampled_from(["finished", "large", "failed", "retry"])


class Recorder(EmbedQueue):
    """Remembers the scripts that it called, for a resend that arrives late."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sent: list[calls.ScriptCall] = []

    def _do(self, step: calls.RedisStep | calls.Pause) -> Any:
        if isinstance(step, calls.ScriptCall):
            self.sent.append(step)
        return super()._do(step)


class Beside(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Recorder(self.url)
        self.redis: Any = self.queue._client
        self.redis.flushall()
        self.promoter = promotion.Promoter(self.redis, [QUEUE])
        self.stop_script = scripts.load(self.redis, "embedq.worker", "stop")
        self.stores: dict[str, ClaimStore] = {}
        self.model = Protocol()
        self.state = State((None,) * len(JOB_IDS))
        #: the stopped jobs
        self.stopped: frozenset[int] = frozenset()
        self.told: list[tuple[ClaimStore, Claim]] = []
        #: by job and execution, the text that its worker noted last
        self.noted: dict[tuple[int, str], int | None] = {}
        #: workers whose last claim had no reply
        self.unanswered: set[str] = set()
        #: each cancellation and requeueing as it was sent, and what the model does for it
        self.changes: list[tuple[calls.ScriptCall, Callable[[], object]]] = []
        self.num_ran_out = itertools.count(1)

    def teardown(self) -> None:
        self.queue.close()

    def store(self, worker: str) -> ClaimStore:
        return self.stores.setdefault(worker, ClaimStore(self.redis, worker, LEASE_S))

    def drawn(self, data: st.DataObject, max_size: int = 3) -> list[tuple[ClaimStore, Claim]]:
        """Claims of one worker, in the order in which they were told; often one of those that still hold their job."""
        holding = [place for place, (_, claim) in enumerate(self.told) if self._holds(claim)]
        places = [data.draw(st.sampled_from(holding))] if holding else []
        if not places or data.draw(st.integers(0, 3)) == 0:
            worker = data.draw(st.sampled_from(sorted({store.worker_name for store, _ in self.told})))
            its_own = [place for place, (store, _) in enumerate(self.told) if store.worker_name == worker]
            places = data.draw(st.lists(st.sampled_from(its_own), min_size=1, max_size=max_size, unique=True))
        return [self.told[place] for place in sorted(places)]

    def _holds(self, claim: Claim) -> bool:
        return self.model.holds(self.state, JOB_IDS.index(claim.job_id), claim.execution_id)

    def _numbers(self, *statuses: str) -> list[int]:
        """The jobs with one of these statuses."""
        return [number for number, job in enumerate(self.state.jobs) if job is not None and job.status in statuses]

    # --- the client

    @initialize(retries=st.lists(st.integers(0, 2), max_size=len(JOB_IDS)))
    def enqueue_some(self, retries: list[int]) -> None:
        for number, its_retries in enumerate(retries):
            self.enqueue(number, its_retries, is_delayed=False)

    @precondition(lambda self: None in self.state.jobs)
    @rule(data=st.data(), retries=st.integers(1, 2), is_delayed=st.booleans())
    def enqueue_another(self, data: st.DataObject, retries: int, is_delayed: bool) -> None:
        """Or one that is there."""
        absent = [number for number, job in enumerate(self.state.jobs) if job is None]
        self.enqueue(data.draw(st.sampled_from([*absent, 0])), retries, is_delayed)

    def enqueue(self, number: int, retries: int, is_delayed: bool) -> None:
        intervals = [DELAY_S] if is_delayed else []
        for _ in range(2):
            text = f"the text of {number}"
            self.queue.enqueue(text, job_id=JOB_IDS[number], retries=retries, retry_intervals=intervals)
            self.state = self.model.enqueue(self.state, number, retries, is_delayed)

    @precondition(lambda self: self._numbers("queued", "started", "scheduled"))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self._numbers("queued", "started", "scheduled", "failed", "canceled")))
        nonce = object()
        was_canceled = self.queue.cancel(JOB_IDS[number])
        found = self._change(lambda: self._cancel(number, nonce))
        assert was_canceled is (found not in protocol_model.TERMINAL)

    def _cancel(self, number: int, nonce: object) -> object:
        self.state, found = self.model.cancel(self.state, number, nonce)
        return found

    @precondition(lambda self: self._numbers("failed", "stopped", "canceled"))
    @rule(data=st.data(), at_front=st.booleans())
    def requeue(self, data: st.DataObject, at_front: bool) -> None:
        number = data.draw(st.sampled_from(self._numbers("failed", "stopped", "canceled", "finished", "started")))
        nonce = object()
        try:
            self.queue.requeue(JOB_IDS[number], at_front=at_front)
            was_requeued = True
        except JobStateError:
            was_requeued = False
        found = self._change(lambda: self._requeue(number, nonce, at_front))
        assert was_requeued is (found in ("failed", "stopped", "canceled"))

    def _requeue(self, number: int, nonce: object, at_front: bool) -> object:
        self.state, found = self.model.requeue(self.state, number, nonce, PUSHES[at_front])
        return found

    def _change(self, change: Callable[[], object]) -> object:
        sent = self.queue.sent[-1]
        self.changes.append((sent, change))
        return change()

    @precondition(lambda self: self.changes)
    @rule(data=st.data())
    def a_resend_arrives_late(self, data: st.DataObject) -> None:
        """Of a cancellation or a requeueing, with whatever has happened since."""
        sent, change = data.draw(st.sampled_from(self.changes[-2:]))
        self.queue._scripts[sent.script](keys=sent.keys, args=sent.args)
        change()

    # --- workers

    @precondition(lambda self: self.state.queue or self.unanswered)
    @rule(worker=WORKERS, max_jobs=st.integers(1, 3), luck=st.integers(0, 3))
    def claim(self, worker: str, max_jobs: int, luck: int) -> None:
        """One whose reply was lost before asks for the same again, and is told of no others."""
        store = self.store(worker)
        nonce = store._nonce
        names = [f"{nonce}-{place}" for place in range(1, max_jobs + 1)]
        self.state, told = self.model.claim(self.state, worker, nonce, names)
        if luck == 0:
            self._lose_reply(store, max_jobs)
            self.unanswered.add(worker)
            return
        self.unanswered.discard(worker)
        found = store.claim([QUEUE], max_jobs, 10**9).claims
        assert [(claim.job_id, claim.execution_id, claim.attempts, claim.is_last) for claim in found] == [
            (JOB_IDS[each.job], each.name, each.attempts, each.attempts > 0 and each.retries_left == 0) for each in told
        ]
        self.told = (self.told + [(store, claim) for claim in found])[-REMEMBERED:]

    def _lose_reply(self, store: ClaimStore, max_jobs: int) -> None:
        script = store._claim

        def loses_the_reply(**call: Any) -> None:
            script(**call)
            raise redis.ConnectionError("gone")

        store._claim = loses_the_reply
        with pytest.raises(redis.ConnectionError):
            store.claim([QUEUE], max_jobs, 10**9)
        store._claim = script

    @precondition(lambda self: self.told)
    @rule(data=st.data(), index=st.none() | st.integers(0, 3))
    def begin(self, data: st.DataObject, index: int | None) -> None:
        chosen = self.drawn(data)
        lost = []
        for _, claim in chosen:
            number = JOB_IDS.index(claim.job_id)
            self.state, holds = self.model.begin(self.state, number, claim.execution_id)
            if holds:
                self.noted[number, claim.execution_id] = index
            else:
                lost.append(claim)
        assert chosen[0][0].begin([(claim, JobFailedError.abandoned(index)) for _, claim in chosen]) == lost

    @precondition(lambda self: self.told)
    @rule(data=st.data(), is_sent_twice=st.booleans())
    def publish(self, data: st.DataObject, is_sent_twice: bool) -> None:
        chosen = self.drawn(data)
        kinds = [data.draw(OUTCOMES) for _ in chosen]
        outcomes = [_outcome(claim, kind) for (_, claim), kind in zip(chosen, kinds, strict=True)]
        for _ in range(1 + is_sent_twice):
            chosen[0][0].publish(outcomes)
            for (_, claim), kind in zip(chosen, kinds, strict=True):
                number = JOB_IDS.index(claim.job_id)
                outcome: Any = "finished" if kind == "large" else kind
                self.state = self.model.finish(self.state, number, claim.execution_id, outcome)

    @precondition(lambda self: self.told)
    @rule(data=st.data(), is_sent_twice=st.booleans())
    def release(self, data: st.DataObject, is_sent_twice: bool) -> None:
        chosen = self.drawn(data)
        pairs = [(JOB_IDS.index(claim.job_id), claim.execution_id) for _, claim in chosen]
        for _ in range(1 + is_sent_twice):
            self.state, released = self.model.release(self.state, pairs)
            assert len(chosen[0][0].release([claim for _, claim in chosen])) == released

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        chosen = self.drawn(data)
        pairs = [(JOB_IDS.index(claim.job_id), claim.execution_id) for _, claim in chosen]
        self.state, lost = self.model.renew(self.state, pairs)
        renewed = chosen[0][0].renew([claim for _, claim in chosen], 60)
        assert [(JOB_IDS.index(claim.job_id), claim.execution_id) for claim in renewed.lost] == lost

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        [(store, claim)] = self.drawn(data, max_size=1)
        number = JOB_IDS.index(claim.job_id)
        if self.model.holds(self.state, number, claim.execution_id):
            self.stopped |= {number}
        self.state = self.model.stop(self.state, number, claim.execution_id)
        reason = wire.encode_exc_string(JobFailedError("stopped", code="stopped"))
        args = [keys.PREFIX, store.worker_name, claim.queue, claim.job_id, claim.execution_id, reason, FAILURE_TTL_S]
        is_stopped = self.stop_script(keys=[], args=args)
        assert bool(is_stopped) is (self.state.job(number).status == "stopped")

    @precondition(lambda self: self.state.executions)
    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        """Or sleeps: what it was told is not forgotten here. What it was not told, it will not ask for again."""
        worker = data.draw(st.sampled_from(sorted({str(execution.worker) for execution in self.state.executions})))
        self.stores.pop(worker, None)
        self.unanswered.discard(worker)
        for execution in [found for found in self.state.executions if found.worker == worker]:
            self._run_out(execution)

    # --- time

    @precondition(lambda self: self.state.executions)
    @rule(data=st.data())
    def a_lease_runs_out(self, data: st.DataObject) -> None:
        self._run_out(data.draw(st.sampled_from(self.state.executions)))

    def _run_out(self, execution: Execution) -> None:
        order = next(self.num_ran_out)
        self.state = self.state.with_execution(execution, execution._replace(ran_out=order))
        pair = f"{JOB_IDS[execution.job]}:{execution.name}"
        assert self.redis.zadd(keys.started(QUEUE), {pair: order}, xx=True, ch=True) == 1

    @precondition(lambda self: any(execution.ran_out for execution in self.state.executions))
    @rule(worker=WORKERS)
    def recover(self, worker: str) -> None:
        before = self.state
        self.state, retried, failed = self.model.recover(self.state)
        taken = sum(bool(execution.ran_out) for execution in before.executions)
        assert self.store(worker).recover(QUEUE) == Recovered(taken, retried, failed, [])
        for execution in before.executions:
            if execution.ran_out and self.state.job(execution.job).status == "failed":
                self._check_reason(execution)

    def _check_reason(self, execution: Execution) -> None:
        """The text that the worker noted, if it noted one."""
        [(_, entry)] = self.redis.xrevrange(keys.results(JOB_IDS[execution.job]), count=1)
        failure = wire.decode_exc_string(entry[b"exc_string"])
        assert failure.code == JobFailedError.ABANDONED
        noted = self.noted[execution.job, str(execution.name)] if execution.has_begun else None
        assert failure.text_index == noted

    @precondition(lambda self: self.state.scheduled)
    @rule(num_due=st.integers(0, 2))
    def promote(self, num_due: int) -> None:
        due = sorted(self.state.scheduled)[:num_due]
        for number in due:
            self.redis.zadd(keys.scheduled(QUEUE), {JOB_IDS[number]: 0}, xx=True)
            self.state = self.model.promote(self.state, number)
        assert self.promoter.promote().moved == len(due)

    @invariant()
    def redis_is_as_the_model_says(self) -> None:
        assert protocol_view.read(self.redis) == protocol_view.of_model(self.state, self.stopped)


def _outcome(claim: Claim, kind: str) -> Outcome:
    if kind in ("finished", "large"):
        return Outcome.finished(claim, b"x" * (STAGE_FROM_BYTES if kind == "large" else 8), 0.5)
    return Outcome.failed(claim, JobFailedError("broken", code="broken", retryable=kind == "retry"))


@pytest.fixture
def machine(each_url: str) -> type[Beside]:
    return type("BesideThere", (Beside,), {"url": each_url})


def test_the_scripts_do_what_the_model_does(machine: type[Beside]) -> None:
    how = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(machine, settings=how)
