"""The queue's protocol as pure functions: what each Lua script makes of the state in Redis, one method a script.

Each method takes a state and returns the next one, with the script's reply where it has one. Times are left out: a
lease has run out or not, a scheduled job is due when it is promoted. Knows no Redis, and no worker's memory, which is
in `protocol_world`.

Beside what stands in Redis each job carries ghosts: what has become of it since it was accepted, for the invariants.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

Status = Literal["queued", "started", "scheduled", "finished", "failed", "stopped", "canceled"]
Outcome = Literal["finished", "failed", "retry"]
Push = Literal["LPUSH", "RPUSH"]

TERMINAL: frozenset[str] = frozenset({"finished", "failed", "stopped", "canceled"})
#: RQ's types of a result stream's entries.
FINISHED, FAILED, STOPPED = 1, 2, 3


class Job(NamedTuple):
    """A job's hash and its result stream."""

    status: Status
    retries: int
    retries_left: int
    #: whether its retries wait in the scheduled registry first
    is_delayed: bool = False
    #: how often it was tried before
    attempts: int = 0
    #: types of the entries, the latest last
    stream: tuple[int, ...] = ()
    #: nonce of the last cancellation or requeueing, and the status it found
    change: tuple[Hashable, Status] | None = None
    #: ghosts, since the job was accepted last, by an enqueueing or a requeueing:
    #: entries of the stream before
    num_old_results: int = 0
    #: attempts before
    num_old_attempts: int = 0
    #: times that it came to a terminal status
    num_ends: int = 0
    #: executions that ran while they held the job, but for those that gave it back
    num_runs: int = 0
    #: and how often it was accepted
    num_acceptances: int = 1

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL


class Execution(NamedTuple):
    """One lease: its places in the started registry, the job's and the worker's sets, and its hash."""

    job: int
    name: Hashable
    worker: Hashable
    #: of the call that claimed it
    nonce: Hashable
    #: what begin.lua notes
    has_begun: bool = False
    #: 0: living; else run out, and recovered in the order of these numbers
    ran_out: int = 0
    #: ghost: somebody computed it while it held the job
    ran: bool = False


class Claim(NamedTuple):
    """What claim.lua tells of one job."""

    job: int
    name: Hashable
    attempts: int
    retries_left: int


class State(NamedTuple):
    """What stands in Redis for one queue."""

    #: None: no such job
    jobs: tuple[Job | None, ...]
    #: the list, its head first
    queue: tuple[int, ...] = ()
    #: in the order in which they were claimed
    executions: tuple[Execution, ...] = ()
    scheduled: frozenset[int] = frozenset()
    finished: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()
    canceled: frozenset[int] = frozenset()
    #: of each worker, the nonce of its last claim that found a job
    nonces: tuple[tuple[Hashable, Hashable], ...] = ()

    def job(self, number: int) -> Job:
        job = self.jobs[number]
        assert job is not None
        return job

    def with_job(self, number: int, job: Job | None) -> State:
        return self._replace(jobs=(*self.jobs[:number], job, *self.jobs[number + 1 :]))

    def execution(self, job: int, name: Hashable) -> Execution | None:
        for execution in self.executions:
            if execution.job == job and execution.name == name:
                return execution
        return None

    def with_execution(self, old: Execution, new: Execution) -> State:
        return self._replace(executions=tuple([new if found == old else found for found in self.executions]))


class Protocol:
    """The scripts. Sent again after a lost reply, each gives the same answer and changes nothing."""

    # --- the client's

    def enqueue(self, state: State, number: int, retries: int, is_delayed: bool = False) -> State:
        if state.jobs[number] is not None:
            return state
        state = state.with_job(number, Job("queued", retries, retries, is_delayed))
        return state._replace(queue=(*state.queue, number))

    def cancel(self, state: State, number: int, nonce: Hashable) -> tuple[State, Status | None]:
        """And the status found."""
        job = state.jobs[number]
        if job is None:
            return state, None
        if job.change is not None and job.change[0] == nonce:
            return state, job.change[1]
        if job.is_terminal:
            return state, job.status
        state = self._end(state, number, "canceled", STOPPED, change=(nonce, job.status))
        state = state._replace(
            queue=_without(state.queue, number) if job.status == "queued" else state.queue,
            scheduled=state.scheduled - {number},
            executions=tuple([found for found in state.executions if found.job != number]),
        )
        return state, job.status

    def requeue(self, state: State, number: int, nonce: Hashable, push: Push = "RPUSH") -> tuple[State, Status | None]:
        """And the status found: unless it is failed, stopped or canceled nothing was changed."""
        job = state.jobs[number]
        if job is None:
            return state, None
        if job.change is not None and job.change[0] == nonce:
            return state, job.change[1]
        if not job.is_terminal or job.status == "finished":
            return state, job.status
        accepted = job._replace(
            status="queued",
            retries_left=job.retries,
            change=(nonce, job.status),
            num_old_results=len(job.stream),
            num_old_attempts=job.attempts,
            num_ends=0,
            num_runs=0,
            num_acceptances=job.num_acceptances + 1,
        )
        state = state.with_job(number, accepted)
        state = state._replace(failed=state.failed - {number}, canceled=state.canceled - {number})
        return _pushed(state, number, push), job.status

    # --- the worker's

    def claim(
        self, state: State, worker: Hashable, nonce: Hashable, names: Sequence[Hashable]
    ) -> tuple[State, list[Claim]]:
        """At most as many jobs as there are names for their executions."""
        if (worker, nonce) in state.nonces:
            return state, self._told_again(state, worker, nonce)
        claims: list[Claim] = []
        queue = list(state.queue)
        while queue and len(claims) < len(names):
            number = queue.pop(0)
            job = state.jobs[number]
            if job is None or job.status != "queued":
                continue
            name = names[len(claims)]
            claims.append(Claim(number, name, job.attempts, job.retries_left))
            state = self._lease(state, Execution(number, name, worker, nonce))
            state = state.with_job(number, job._replace(status="started"))
        state = state._replace(queue=tuple(queue))
        return _with_nonce(state, worker, nonce) if claims else state, claims

    def begin(self, state: State, number: int, name: Hashable) -> tuple[State, bool]:
        """And whether the execution still holds its job."""
        execution = state.execution(number, name)
        if execution is None or not self.holds(state, number, name):
            return state, False
        return state.with_execution(execution, execution._replace(has_begun=True)), True

    def finish(self, state: State, number: int, name: Hashable, outcome: Outcome) -> State:
        if self.holds(state, number, name):
            if outcome != "retry":
                status: Status = "finished" if outcome == "finished" else "failed"
                state = self._end(state, number, status, FINISHED if outcome == "finished" else FAILED)
            else:
                state = self._try_again_or_fail(state, number)
        return self.end_execution(state, number, name)

    def release(self, state: State, pairs: Iterable[tuple[int, Hashable]]) -> tuple[State, int]:
        """And how many were given back. pairs: job and execution, in the order of the claim."""
        released = 0
        for number, name in reversed(list(pairs)):
            if self.holds(state, number, name):
                state = self._without_run(state, number, name)
                state = self._put_back(state, number, "LPUSH")
                released += 1
            state = self.end_execution(state, number, name)
        return state, released

    def renew(self, state: State, pairs: Iterable[tuple[int, Hashable]]) -> tuple[State, list[tuple[int, Hashable]]]:
        """And those that are held no longer."""
        lost: list[tuple[int, Hashable]] = []
        for number, name in pairs:
            execution = state.execution(number, name)
            if execution is not None and self.holds(state, number, name):
                state = state.with_execution(execution, execution._replace(ran_out=0))
            else:
                state = self.end_execution(state, number, name)
                lost.append((number, name))
        return state, lost

    def recover(self, state: State, limit: int | None = None) -> tuple[State, int, int]:
        """And how many wait again, and how many failed."""
        retried = failed = 0
        abandoned = sorted([found for found in state.executions if found.ran_out], key=lambda found: found.ran_out)
        for execution in abandoned[:limit]:
            number, before = execution.job, state.job(execution.job)
            if before.status == "started":
                state = self._take_back(state, execution)
                has_failed = state.job(number).status == "failed"
                retried, failed = retried + (not has_failed), failed + has_failed
            state = self.end_execution(state, number, execution.name)
        return state, retried, failed

    def stop(self, state: State, number: int, name: Hashable) -> State:
        if not self.holds(state, number, name):
            return state
        return self.end_execution(self._end(state, number, "stopped", FAILED), number, name)

    def promote(self, state: State, number: int) -> State:
        """One whose time has come."""
        state = state._replace(scheduled=state.scheduled - {number})
        job = state.jobs[number]
        if job is None or job.status != "scheduled":
            return state
        return _pushed(state.with_job(number, job._replace(status="queued")), number, "RPUSH")

    # --- what the scripts share

    def holds(self, state: State, number: int, name: Hashable) -> bool:
        job = state.jobs[number]
        return job is not None and job.status == "started" and state.execution(number, name) is not None

    def end_execution(self, state: State, number: int, name: Hashable) -> State:
        kept = [found for found in state.executions if found.job != number or found.name != name]
        return state if len(kept) == len(state.executions) else state._replace(executions=tuple(kept))

    def _lease(self, state: State, execution: Execution) -> State:
        return state._replace(executions=(*state.executions, execution))

    def _told_again(self, state: State, worker: Hashable, nonce: Hashable) -> list[Claim]:
        return [
            Claim(found.job, found.name, state.job(found.job).attempts, state.job(found.job).retries_left)
            for found in state.executions
            if found.worker == worker and found.nonce == nonce and state.job(found.job).status == "started"
        ]

    def _take_back(self, state: State, execution: Execution) -> State:
        if self._is_spared(state.job(execution.job), execution):
            return self._put_back(state, execution.job, "RPUSH")
        return self._try_again_or_fail(state, execution.job)

    def _is_spared(self, job: Job, execution: Execution) -> bool:
        """A job that was tried before and that the worker had not begun is not to blame for the worker's end."""
        return job.attempts > 0 and not execution.has_begun

    def _try_again_or_fail(self, state: State, number: int) -> State:
        job = state.job(number)
        if job.retries_left < 1:
            return self._end(state, number, "failed", FAILED)
        state = state.with_job(number, job._replace(retries_left=job.retries_left - 1, attempts=job.attempts + 1))
        if not job.is_delayed:
            return self._put_back(state, number, "RPUSH")
        state = state.with_job(number, state.job(number)._replace(status="scheduled"))
        return state._replace(scheduled=state.scheduled | {number})

    def _put_back(self, state: State, number: int, push: Push) -> State:
        return _pushed(state.with_job(number, state.job(number)._replace(status="queued")), number, push)

    def _end(self, state: State, number: int, status: Status, entry: int, **fields: object) -> State:
        job = state.job(number)
        ended = job._replace(status=status, stream=(*job.stream, entry), num_ends=job.num_ends + 1, **fields)  # type: ignore[arg-type]
        state = state.with_job(number, ended)
        if status == "finished":
            return state._replace(finished=state.finished | {number})
        if status == "canceled":
            return state._replace(canceled=state.canceled | {number})
        return state._replace(failed=state.failed | {number})

    def _without_run(self, state: State, number: int, name: Hashable) -> State:
        """What gave its job back has not used up an attempt."""
        execution, job = state.execution(number, name), state.job(number)
        if execution is None or not execution.ran:
            return state
        return state.with_job(number, job._replace(num_runs=job.num_runs - 1))


def _pushed(state: State, number: int, push: Push) -> State:
    return state._replace(queue=(*state.queue, number) if push == "RPUSH" else (number, *state.queue))


def _without(queue: tuple[int, ...], number: int) -> tuple[int, ...]:
    """But for the first of them."""
    if number not in queue:
        return queue
    place = queue.index(number)
    return (*queue[:place], *queue[place + 1 :])


def _with_nonce(state: State, worker: Hashable, nonce: Hashable) -> State:
    others = [pair for pair in state.nonces if pair[0] != worker]
    return state._replace(nonces=(*others, (worker, nonce)))
