"""Workers and a client around the model of the scripts: what each of them may do next, and what may go wrong.

A worker that sleeps is one that takes no step while its leases run out; one that wakes takes the next. A reply that is
lost leaves the caller's memory as it was, so that the same call is made again. Workers are alike, so that states that
differ only in which is which count as one. Knows the protocol's methods, not how a state is searched for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from tests.queue.protocol_model import Claim, Execution, Outcome, Protocol, State

#: The owner of an execution whose worker has died: it started anew, under another name.
NOBODY = -1
#: The nonces of a worker's last claim: of one whose reply came, which nobody asks for again, and of one that didn't.
OLD, PENDING = 0, 1


class JobPlan(NamedTuple):
    """A job as somebody enqueues it."""

    retries: int
    is_delayed: bool = False
    #: a worker that computes it dies
    is_killer: bool = False


class Mishaps(NamedTuple):
    """How often each thing may still happen."""

    kills: int = 0
    #: leases of live workers that run out
    overruns: int = 0
    lost_replies: int = 0
    #: workers that give back what they hold and leave
    leaves: int = 0
    cancels: int = 0
    requeues: int = 0
    stops: int = 0


class Plan(NamedTuple):
    """What there is and what may happen to it."""

    jobs: tuple[JobPlan, ...]
    mishaps: Mishaps = Mishaps()
    num_workers: int = 2
    #: what a computation may come to
    outcomes: tuple[Outcome, ...] = ("finished",)
    #: jobs of one claim
    claim_sizes: tuple[int, ...] = (1, 2)
    #: whether all jobs are enqueued before anything else happens
    starts_full: bool = False


class Held(NamedTuple):
    """One claim in a worker's memory."""

    job: int
    name: int
    was_tried: bool
    is_last: bool
    #: `beginning`: the reply to begin.lua was lost. An outcome: it is computed, and not published as far as is known
    stage: Literal["waiting", "beginning", "running"] | Outcome = "waiting"


class Worker(NamedTuple):
    #: in the order in which they were claimed
    held: tuple[Held, ...] = ()
    #: whether the reply to its last claim was lost
    has_pending_claim: bool = False


class Call(NamedTuple):
    """A client's call whose reply was lost."""

    kind: Literal["cancel", "requeue"]
    job: int
    nonce: str


class Node(NamedTuple):
    redis: State
    workers: tuple[Worker, ...]
    left: Mishaps
    call: Call | None = None


class Step(NamedTuple):
    label: str
    #: what happens in the end if nothing goes wrong any more
    is_progress: bool
    node: Node


class World:
    """The steps from each state on."""

    def __init__(self, plan: Plan, protocol: Protocol) -> None:
        self.plan = plan
        self.protocol = protocol

    def first(self) -> Node:
        empty = State((None,) * len(self.plan.jobs))
        node = Node(empty, (Worker(),) * self.plan.num_workers, self.plan.mishaps)
        for number in range(len(self.plan.jobs)) if self.plan.starts_full else ():
            node = self._enqueue(node, number).node
        return node

    def steps(self, node: Node) -> Iterator[Step]:
        for step in self._all_steps(node):
            after = canonical(step.node)
            if after != node:
                yield Step(step.label, step.is_progress, after)

    def _all_steps(self, node: Node) -> Iterator[Step]:
        for number, job in enumerate(node.redis.jobs):
            if job is None:
                yield self._enqueue(node, number)
        yield from self._time_passes(node)
        yield from self._client_steps(node)
        for place, worker in enumerate(node.workers):
            yield from self._claims(node, place, worker)
            yield from self._ends(node, place, worker)
            for held in worker.held:
                yield from self._work(node, place, worker, held)

    # --- the client, and time

    def _enqueue(self, node: Node, number: int) -> Step:
        plan = self.plan.jobs[number]
        redis = self.protocol.enqueue(node.redis, number, plan.retries, plan.is_delayed)
        return Step(f"enqueue {number}", True, node._replace(redis=redis))

    def _time_passes(self, node: Node) -> Iterator[Step]:
        redis = node.redis
        for number in redis.scheduled:
            yield Step(f"promote {number}", True, node._replace(redis=self.protocol.promote(redis, number)))
        for execution in redis.executions:
            if execution.ran_out:
                continue
            ran_out = node._replace(redis=redis.with_execution(execution, execution._replace(ran_out=1)))
            if not self._is_renewed(node, execution):
                yield Step(f"the lease of {execution.job} runs out", True, ran_out)
            elif node.left.overruns:
                yield Step(f"the lease of {execution.job} is overrun", False, spent(ran_out, "overruns"))
        if any(execution.ran_out for execution in redis.executions):
            yield Step("recover", True, node._replace(redis=self.protocol.recover(redis)[0]))

    def _is_renewed(self, node: Node, execution: Execution) -> bool:
        """Whether a worker lives that holds it, or will learn that it does."""
        if execution.worker == NOBODY:
            return False
        worker = node.workers[execution.worker]  # type: ignore[call-overload]
        is_told = any(held.job == execution.job and held.name == execution.name for held in worker.held)
        return is_told or (worker.has_pending_claim and execution.nonce == PENDING)

    def _client_steps(self, node: Node) -> Iterator[Step]:
        if node.call is not None:
            yield Step(f"{node.call.kind} again", True, self._called(node, node.call)._replace(call=None))
            return
        for number, job in enumerate(node.redis.jobs):
            if job is None:
                continue
            if node.left.cancels and not job.is_terminal:
                call = Call("cancel", number, f"c{node.left.cancels}")
                yield from self._calls(node, call, "cancels")
            if node.left.requeues and job.is_terminal and job.status != "finished":
                call = Call("requeue", number, f"r{node.left.requeues}")
                yield from self._calls(node, call, "requeues")

    def _calls(self, node: Node, call: Call, budget: str) -> Iterator[Step]:
        after = spent(self._called(node, call), budget)
        yield Step(f"{call.kind} {call.job}", False, after)
        if node.left.lost_replies:
            yield Step(f"{call.kind} {call.job}, no reply", False, spent(after._replace(call=call), "lost_replies"))

    def _called(self, node: Node, call: Call) -> Node:
        change = self.protocol.cancel if call.kind == "cancel" else self.protocol.requeue
        return node._replace(redis=change(node.redis, call.job, call.nonce)[0])

    # --- a worker

    def _claims(self, node: Node, place: int, worker: Worker) -> Iterator[Step]:
        if worker.has_pending_claim:
            redis, claims = self.protocol.claim(node.redis, place, PENDING, self._names(node))
            yield Step(f"{place} claims again", True, self._told(node, place, redis, claims))
            return
        if not node.redis.queue or any(held.was_tried and held.stage != "waiting" for held in worker.held):
            return
        for size in self.plan.claim_sizes:
            redis, claims = self.protocol.claim(node.redis, place, PENDING, self._names(node)[:size])
            yield Step(f"{place} claims {size}", True, self._told(node, place, redis, claims))
            if node.left.lost_replies and claims:
                pending = with_worker(node, place, worker._replace(has_pending_claim=True))._replace(redis=redis)
                yield Step(f"{place} claims {size}, no reply", False, spent(pending, "lost_replies"))

    def _names(self, node: Node) -> list[int]:
        """For the next execution of each waiting job, the lowest that none of its goes by."""
        taken = {(execution.job, execution.name) for execution in node.redis.executions}
        taken.update((held.job, held.name) for worker in node.workers for held in worker.held)
        return [next(name for name in itertools.count() if (job, name) not in taken) for job in node.redis.queue]

    def _told(self, node: Node, place: int, redis: State, claims: list[Claim]) -> Node:
        """The reply to a claim is here: nobody asks for it again."""
        new = tuple(
            Held(claim.job, claim.name, claim.attempts > 0, claim.attempts > 0 and claim.retries_left == 0)  # type: ignore[arg-type]
            for claim in claims
        )
        redis = redis._replace(
            executions=tuple(
                found._replace(nonce=OLD) if found.worker == place and found.nonce == PENDING else found
                for found in redis.executions
            ),
            nonces=tuple(pair for pair in redis.nonces if pair[0] != place),
        )
        return with_worker(node, place, Worker(node.workers[place].held + new))._replace(redis=redis)

    def _work(self, node: Node, place: int, worker: Worker, held: Held) -> Iterator[Step]:
        if held.stage in ("waiting", "beginning"):
            if self.may_run(worker, held):
                yield from self._runs(node, place, held)
        elif held.stage != "running":
            yield from self._publishes(node, place, held, held.stage)  # type: ignore[arg-type]
        elif self.plan.jobs[held.job].is_killer:
            yield Step(f"{held.job} kills {place}", True, self._died(node, place))
        else:
            for outcome in self.plan.outcomes:
                computed = replaced(node, place, held, held._replace(stage=outcome))
                yield Step(f"{place} computes {held.job}: {outcome}", True, computed)
        execution = node.redis.execution(held.job, held.name)
        if execution is None or execution.ran_out:
            yield self._renews(node, place, held)
        if node.left.stops:
            stopped = node._replace(redis=self.protocol.stop(node.redis, held.job, held.name))
            yield Step(f"{place} stops {held.job}", False, spent(replaced(stopped, place, held, None), "stops"))

    def may_run(self, worker: Worker, held: Held) -> bool:
        """Jobs that were tried before run when no first attempt is in hand; on their last attempt, alone: with nothing
        beside them that has begun and is not published.
        """
        begun = [other for other in worker.held if other != held and other.stage != "waiting"]
        if not held.was_tried:
            return not any(other.was_tried for other in begun)
        if any(not other.was_tried for other in worker.held):
            return False
        return not begun if held.is_last else not any(other.is_last for other in begun)

    def _runs(self, node: Node, place: int, held: Held) -> Iterator[Step]:
        if not held.was_tried:
            running = replaced(node, place, held, held._replace(stage="running"))
            yield Step(f"{place} runs {held.job}", True, self._noted(running, held))
            return
        redis, holds = self.protocol.begin(node.redis, held.job, held.name)
        begun = node._replace(redis=redis)
        if not holds:
            yield Step(f"{place} has lost {held.job}", True, replaced(begun, place, held, None))
            return
        running = replaced(begun, place, held, held._replace(stage="running"))
        yield Step(f"{place} begins {held.job}", True, self._noted(running, held))
        if node.left.lost_replies:
            beginning = replaced(begun, place, held, held._replace(stage="beginning"))
            yield Step(f"{place} begins {held.job}, no reply", False, spent(beginning, "lost_replies"))

    def _noted(self, node: Node, held: Held) -> Node:
        """The ghosts of a run."""
        execution = node.redis.execution(held.job, held.name)
        if execution is None or not self.protocol.holds(node.redis, held.job, held.name) or execution.ran:
            return node
        job = node.redis.job(held.job)
        redis = node.redis.with_execution(execution, execution._replace(ran=True))
        return node._replace(redis=redis.with_job(held.job, job._replace(num_runs=job.num_runs + 1)))

    def _publishes(self, node: Node, place: int, held: Held, outcome: Outcome) -> Iterator[Step]:
        done = node._replace(redis=self.protocol.finish(node.redis, held.job, held.name, outcome))
        yield Step(f"{place} publishes {held.job}: {outcome}", True, replaced(done, place, held, None))
        if node.left.lost_replies:
            yield Step(f"{place} publishes {held.job}, no reply", False, spent(done, "lost_replies"))

    def _renews(self, node: Node, place: int, held: Held) -> Step:
        redis, lost = self.protocol.renew(node.redis, [(held.job, held.name)])
        renewed = node._replace(redis=redis)
        return Step(f"{place} renews {held.job}", True, replaced(renewed, place, held, None) if lost else renewed)

    def _ends(self, node: Node, place: int, worker: Worker) -> Iterator[Step]:
        has_anything = worker.held or worker.has_pending_claim
        if has_anything and node.left.kills:
            yield Step(f"{place} dies", False, spent(self._died(node, place), "kills"))
        if worker.held and node.left.leaves:
            pairs = [(held.job, held.name) for held in worker.held]
            released = node._replace(redis=self.protocol.release(node.redis, pairs)[0])
            yield Step(f"{place} leaves", False, spent(self._died(released, place), "leaves"))
            if node.left.lost_replies:
                yield Step(f"{place} releases, no reply", False, spent(released, "lost_replies"))

    def _died(self, node: Node, place: int) -> Node:
        """Another worker starts in its place and knows nothing."""
        redis = node.redis._replace(
            executions=tuple(
                found._replace(worker=NOBODY, nonce=OLD) if found.worker == place else found
                for found in node.redis.executions
            ),
            nonces=tuple(pair for pair in node.redis.nonces if pair[0] != place),
        )
        return with_worker(node, place, Worker())._replace(redis=redis)


def with_worker(node: Node, place: int, worker: Worker) -> Node:
    return node._replace(workers=(*node.workers[:place], worker, *node.workers[place + 1 :]))


def replaced(node: Node, place: int, old: Held, new: Held | None) -> Node:
    """Another stage of one claim; None: the worker forgets it."""
    worker = node.workers[place]
    held = [new if found == old else found for found in worker.held]
    return with_worker(node, place, worker._replace(held=tuple([found for found in held if found is not None])))


def spent(node: Node, budget: str) -> Node:
    return node._replace(left=node.left._replace(**{budget: getattr(node.left, budget) - 1}))


def canonical(node: Node) -> Node:
    """The same with the workers sorted by what they remember."""
    workers = node.workers
    order = sorted(range(len(workers)), key=workers.__getitem__)
    if order == list(range(len(workers))):
        return node
    new_place: dict[object, int] = {NOBODY: NOBODY}
    new_place.update((old, new) for new, old in enumerate(order))
    redis = node.redis._replace(
        executions=tuple([found._replace(worker=new_place[found.worker]) for found in node.redis.executions]),
        nonces=tuple(sorted([(new_place[worker], nonce) for worker, nonce in node.redis.nonces])),
    )
    return node._replace(redis=redis, workers=tuple([workers[place] for place in order]))
