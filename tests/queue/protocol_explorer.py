"""Every state that a world can come to, breadth first: what must hold in each, and where each must lead.

Progress must come to an end, and only where every job is done: in a finite graph without a cycle of progress every way
of going on ends, so nothing is held for ever whoever is scheduled when. Knows steps and invariants, no mishaps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from tests.queue.protocol_model import Job, State
from tests.queue.protocol_world import Node, World

#: Says what is wrong with a state, or nothing.
Invariant = Callable[[Node], str | None]


class ViolationError(AssertionError):
    """The message has the steps that lead there."""


@dataclass(frozen=True, slots=True)
class Explored:
    num_states: int
    num_steps: int


def explore(world: World, *invariants: Invariant) -> Explored:
    """Raises ViolationError at the first state, by number of steps, at which an invariant fails."""
    found = _Graph()
    found.add(world.first(), None, "")
    frontier = deque([0])
    num_steps = 0
    while frontier:
        at = frontier.popleft()
        for step in world.steps(found.nodes[at]):
            num_steps += 1
            to = found.places.get(step.node)
            if to is None:
                to = found.add(step.node, at, step.label)
                frontier.append(to)
                for invariant in (each_job_is_in_one_place, each_job_ends_once, *invariants):
                    if wrong := invariant(step.node):
                        raise ViolationError(found.told(to, wrong))
            if step.is_progress:
                found.progress[at].append(to)
    _check_progress(found)
    return Explored(len(found.nodes), num_steps)


def each_job_is_in_one_place(node: Node) -> str | None:
    """The one that its status says."""
    redis = node.redis
    found: Counter[tuple[int, str]] = Counter((number, "queued") for number in redis.queue)
    found.update((execution.job, "started") for execution in redis.executions)
    for name, places in (("scheduled", redis.scheduled), ("finished", redis.finished), ("canceled", redis.canceled)):
        found.update((number, name) for number in places)
    found.update((number, _failure(redis, number)) for number in redis.failed)
    wanted = Counter((number, job.status) for number, job in enumerate(redis.jobs) if job is not None)
    return None if found == wanted else f"jobs are at {dict(found)} and should be at {dict(wanted)}"


def _failure(redis: State, number: int) -> str:
    """The failed registry has the stopped ones too."""
    return "stopped" if redis.job(number).status == "stopped" else "failed"


def each_job_ends_once(node: Node) -> str | None:
    for number, job in enumerate(node.redis.jobs):
        if job is not None and (wrong := _wrong_with(job)):
            return f"job {number} {wrong}: {job}"
    return None


def _wrong_with(job: Job) -> str | None:
    """Since it was accepted."""
    if job.num_ends != job.is_terminal:
        return f"has ended {job.num_ends} times"
    if len(job.stream) - job.num_old_results != job.num_ends:
        return "has not one result for its end"
    if job.num_runs > job.retries + 1:
        return "ran more often than it may"
    if not 0 <= job.attempts - job.num_old_attempts <= job.retries or job.retries_left < 0:
        return "was tried more often than it may"
    return None


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.places: dict[Node, int] = {}
        #: of each state, where progress leads to
        self.progress: list[list[int]] = []
        self._came_by: list[tuple[int | None, str]] = []

    def add(self, node: Node, before: int | None, label: str) -> int:
        self.places[node] = len(self.nodes)
        self.nodes.append(node)
        self.progress.append([])
        self._came_by.append((before, label))
        return len(self.nodes) - 1

    def told(self, place: int, wrong: str) -> str:
        labels: list[str] = []
        at: int | None = place
        while at is not None:
            at, label = self._came_by[at]
            labels.append(label)
        return f"{wrong}; after: {', '.join(reversed(labels[:-1]))}"


def _check_progress(graph: _Graph) -> None:
    """Raises ViolationError for progress that goes round in a circle, or ends before every job is done."""
    num_before = [0] * len(graph.nodes)
    for followers in graph.progress:
        for follower in followers:
            num_before[follower] += 1
    free = deque(place for place, number in enumerate(num_before) if number == 0)
    num_seen = 0
    while free:
        place = free.popleft()
        num_seen += 1
        if not graph.progress[place] and not _is_over(graph.nodes[place]):
            raise ViolationError(graph.told(place, f"nothing goes on: {graph.nodes[place]}"))
        for follower in graph.progress[place]:
            num_before[follower] -= 1
            if num_before[follower] == 0:
                free.append(follower)
    if num_seen < len(graph.nodes):
        place = next(place for place, number in enumerate(num_before) if number)
        raise ViolationError(graph.told(place, f"it goes on for ever: {graph.nodes[place]}"))


def _is_over(node: Node) -> bool:
    """Every job is done and nobody remembers any."""
    is_done = all(job is not None and job.is_terminal for job in node.redis.jobs)
    return is_done and not any(worker.held or worker.has_pending_claim for worker in node.workers)
