"""Every way in which a few workers, jobs and mishaps can mix, on the model of the protocol: nothing is lost or doubled.

Each mutant leaves out one rule of the protocol or of the worker and must be found out: else the search would prove
nothing. That the model is the protocol's is `test_protocol_stateful`'s to show.
"""

# ruff: noqa: ARG002  (a mutant leaves out what it is given)

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import pytest

from tests.queue.protocol_explorer import Invariant, ViolationError, explore
from tests.queue.protocol_model import Claim, Execution, Job, Protocol, Push, State, Status
from tests.queue.protocol_world import Held, JobPlan, Mishaps, Node, Plan, Step, Worker, World

TWO = (JobPlan(retries=1), JobPlan(retries=1))
KILLER = JobPlan(retries=1, is_killer=True)
#: Mishaps that cannot cost an attempt: nothing dies and no lease runs out.
HARMLESS = ("lost_replies", "cancels", "stops")


def _pair(first: str, second: str) -> Plan:
    """Two mishaps in any order and at any time, or twice the same."""
    left = dict.fromkeys(Mishaps._fields, 0)
    for name in (first, second):
        left[name] += 1
    if "requeues" not in (first, second):
        return Plan(TWO, Mishaps(**left))
    return Plan((JobPlan(retries=0), JobPlan(retries=1)), Mishaps(**left), outcomes=("finished", "failed"))


PAIRS = {
    f"{first} and {second}": _pair(first, second)
    for first, second in itertools.combinations_with_replacement(Mishaps._fields, 2)
}
WORLDS = {
    "no retries, three deaths": Plan((JobPlan(0), JobPlan(0)), Mishaps(kills=3)),
    "two retries, three deaths": Plan((JobPlan(2), JobPlan(2)), Mishaps(kills=3)),
    "failures that may pass": Plan(
        (JobPlan(2), JobPlan(1)), Mishaps(kills=1), outcomes=("finished", "failed", "retry")
    ),
    "retries after an interval": Plan(
        (JobPlan(1, is_delayed=True), JobPlan(1)), Mishaps(overruns=1), outcomes=("retry",)
    ),
    "a death, an overrun and a lost reply": Plan(TWO, Mishaps(kills=1, overruns=1, lost_replies=1)),
    "a killer, a death and an overrun": Plan((KILLER, JobPlan(1)), Mishaps(kills=1, overruns=1)),
    "one job, everything at once": Plan((JobPlan(1),), Mishaps(1, 1, 1, 1, 1, 0, 1), outcomes=("finished", "retry")),
}
#: Worlds in which only killers kill.
POISONED = {
    "a killer and two retries": Plan((KILLER, JobPlan(2))),
    "a killer of two retries and an innocent of one": Plan((JobPlan(2, is_killer=True), JobPlan(1))),
    "a killer and lost replies": Plan((KILLER, JobPlan(1)), Mishaps(lost_replies=1)),
    "a killer and workers that leave": Plan((KILLER, JobPlan(1)), Mishaps(leaves=1)),
    "a killer and two innocents": Plan((KILLER, JobPlan(1), JobPlan(1)), claim_sizes=(1, 3), starts_full=True),
    "two killers": Plan((KILLER, KILLER, JobPlan(1)), num_workers=1, starts_full=True),
}


def innocents_survive(plan: Plan) -> Invariant:
    """Jobs that kill nobody and have a retry for the first attempt that they may share with a killer."""
    innocent = [number for number, job in enumerate(plan.jobs) if not job.is_killer and job.retries > 0]

    def find(node: Node) -> str | None:
        for number in innocent:
            job = node.redis.jobs[number]
            if job is not None and job.status == "failed":
                return f"job {number} failed for what another did"
        return None

    return find


def nothing_costs_an_attempt(node: Node) -> str | None:
    jobs = [job for job in node.redis.jobs if job is not None]
    return "an attempt was counted without a cause" if any(job.attempts for job in jobs) else None


def each_call_requeues_once(plan: Plan) -> Invariant:
    def find(node: Node) -> str | None:
        allowed = 1 + plan.mishaps.requeues - node.left.requeues
        num_acceptances = [job.num_acceptances for job in node.redis.jobs if job is not None]
        return "one call requeued twice" if max(num_acceptances, default=0) > allowed else None

    return find


@pytest.mark.parametrize("name", [*PAIRS, *WORLDS])
def test_no_job_is_lost_or_ends_twice_whatever_comes_when(name: str) -> None:
    plan = (PAIRS | WORLDS)[name]
    explored = explore(World(plan, Protocol()), each_call_requeues_once(plan))
    assert explored.num_states > 50


@pytest.mark.parametrize("name", POISONED)
def test_a_job_that_kills_workers_fails_alone(name: str) -> None:
    plan = POISONED[name]
    explore(World(plan, Protocol()), innocents_survive(plan))


@pytest.mark.parametrize("mishap", HARMLESS)
def test_no_attempt_is_counted_where_no_worker_fails(mishap: str) -> None:
    plan = Plan(TWO, Mishaps(**{mishap: 2}))
    explore(World(plan, Protocol()), nothing_costs_an_attempt)


# --- what the search finds where a rule is missing


class Unfenced(Protocol):
    """Whoever comes counts, whether or not the job is its own any more."""

    def holds(self, state: State, number: int, name: Hashable) -> bool:
        return state.jobs[number] is not None


class FencedByStatusAlone(Protocol):
    """A job that another worker has by now is started, too."""

    def holds(self, state: State, number: int, name: Hashable) -> bool:
        job = state.jobs[number]
        return job is not None and job.status == "started"


class ClaimsWithoutLease(Protocol):
    """As a plain BLPOP takes a job."""

    def _lease(self, state: State, execution: Execution) -> State:
        return state


class ClaimsAnewAfterALostReply(Protocol):
    """The same nonce means nothing."""

    def claim(
        self, state: State, worker: Hashable, nonce: Hashable, names: Sequence[Hashable]
    ) -> tuple[State, list[Claim]]:
        return super().claim(state._replace(nonces=()), worker, nonce, names)


class KeepsItsExecutions(Protocol):
    def end_execution(self, state: State, number: int, name: Hashable) -> State:
        return state


class BlamesWhatHadNotBegun(Protocol):
    """A worker's death costs an attempt whatever it had in hand."""

    def _is_spared(self, job: Job, execution: Execution) -> bool:
        return False


class SparesFirstAttempts(Protocol):
    """None of them is noted as begun."""

    def _is_spared(self, job: Job, execution: Execution) -> bool:
        return not execution.has_begun


class NeverCounts(Protocol):
    """A retry costs none."""

    def _try_again_or_fail(self, state: State, number: int) -> State:
        return self._put_back(state, number, "RPUSH")


class NeverRecovers(Protocol):
    def recover(self, state: State, limit: int | None = None) -> tuple[State, int, int]:
        return state, 0, 0


class CancelsWhatItFinds(Protocol):
    """And leaves the workers their leases."""

    def cancel(self, state: State, number: int, nonce: Hashable) -> tuple[State, Status | None]:
        canceled, found = super().cancel(state, number, nonce)
        return canceled._replace(executions=state.executions), found


class RequeuesAgain(Protocol):
    """A call sent twice does its work twice."""

    def requeue(self, state: State, number: int, nonce: Hashable, push: Push = "RPUSH") -> tuple[State, Status | None]:
        job = state.jobs[number]
        if job is not None:
            state = state.with_job(number, job._replace(change=None))
        return super().requeue(state, number, nonce, push)


class BeginsTogether(World):
    """Jobs that were tried before share micro-batches with first attempts."""

    def may_run(self, worker: Worker, held: Held) -> bool:
        return True


class EndsTogether(World):
    """A job's last attempt is one in a micro-batch of jobs that were tried before."""

    def may_run(self, worker: Worker, held: Held) -> bool:
        like_others = [other._replace(is_last=False) for other in worker.held]
        return super().may_run(worker._replace(held=tuple(like_others)), held._replace(is_last=False))


class BeginsAnother(World):
    """After a lost reply to begin.lua the worker begins another job than the one that stands noted."""

    def may_run(self, worker: Worker, held: Held) -> bool:
        others = [other for other in worker.held if other.stage != "beginning"]
        return super().may_run(worker._replace(held=tuple(others)), held)


class PublishesLater(World):
    """The next job begins while the one before is on its way to Redis."""

    def may_run(self, worker: Worker, held: Held) -> bool:
        on_device = [other for other in worker.held if other.stage in ("waiting", "running")]
        return super().may_run(worker._replace(held=tuple(on_device)), held)


class BeginsUnnoted(World):
    """The worker does not say that it begins."""

    def _runs(self, node: Node, place: int, held: Held) -> Sequence[Step]:  # type: ignore[override]
        steps = list(super()._runs(node, place, held))
        return [step._replace(node=step.node._replace(redis=_with_nothing_begun(step.node.redis))) for step in steps]


def _with_nothing_begun(state: State) -> State:
    executions = [execution._replace(has_begun=False) for execution in state.executions]
    return state._replace(executions=tuple(executions))


OVERRUN = Plan(TWO, Mishaps(overruns=1))
DEATH = Plan(TWO, Mishaps(kills=1))
LOST = Plan(TWO, Mishaps(lost_replies=1))


@pytest.mark.parametrize(
    ("mutant", "plan"),
    [
        (Unfenced, OVERRUN),
        (FencedByStatusAlone, OVERRUN),
        (ClaimsWithoutLease, Plan(TWO)),
        (ClaimsAnewAfterALostReply, LOST),
        (KeepsItsExecutions, Plan(TWO)),
        (SparesFirstAttempts, Plan((KILLER,))),
        (NeverCounts, Plan((KILLER,))),
        (NeverRecovers, DEATH),
        (CancelsWhatItFinds, Plan(TWO, Mishaps(cancels=1))),
        (RequeuesAgain, Plan((JobPlan(0),), Mishaps(requeues=1, lost_replies=1), outcomes=("failed",))),
    ],
)
def test_a_protocol_without_one_of_its_rules_is_found_out(mutant: type[Protocol], plan: Plan) -> None:
    invariants: list[Invariant] = [each_call_requeues_once(plan)]
    if plan is LOST:
        invariants.append(nothing_costs_an_attempt)
    explore(World(plan, Protocol()), *invariants)
    with pytest.raises(ViolationError, match="after:"):
        explore(World(plan, mutant()), *invariants)


KILLER_AND_TWO = POISONED["a killer and two innocents"]


@pytest.mark.parametrize(
    ("world", "protocol", "plan"),
    [
        (World, BlamesWhatHadNotBegun, KILLER_AND_TWO),
        (BeginsTogether, Protocol, KILLER_AND_TWO),
        (EndsTogether, Protocol, KILLER_AND_TWO),
        (PublishesLater, Protocol, KILLER_AND_TWO),
        (BeginsUnnoted, Protocol, KILLER_AND_TWO),
        (BeginsAnother, Protocol, POISONED["a killer and lost replies"]),
    ],
)
def test_a_worker_without_quarantine_is_found_out(world: type[World], protocol: type[Protocol], plan: Plan) -> None:
    with pytest.raises(ViolationError, match="after:"):
        explore(world(plan, protocol()), innocents_survive(plan))
