"""Exercises with a supervisor of several worker processes: a rolling restart by signal, a killed process, and processes
that hang or stand still.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from embedq.producer import JobFailedError, keys
from tests.ops.audit import await_ends, finish_times
from tests.ops.finding import Finding
from tests.ops.places import Served, until
from tests.ops.rolling import FLEET, MAX_GAP_S
from tests.ops.scrape import get
from tests.ops.stand_in import harmful
from tests.ops.world import LEASE_S, World, pause, tell_jobs

#: Seconds from a process's death until there is a new one that is ready.
MAX_BACK_S = 5.0
#: Seconds beyond a lease until a dead process's jobs are done.
MAX_RECOVERY_S = 15.0
#: Seconds without progress, and without an answer, that a process may take; and beyond either until /livez is red.
LIVENESS_S, SILENT_S, RED_WITHIN_S = 3.0, 5.0, 3.0
#: Seconds beyond those until a new process is ready: the supervisor looks twice and lets the old one leave.
MAX_REPLACED_S = 15.0
PROCESSES = "embedq_supervisor_processes"
RESTARTS = "embedq_supervisor_restarts_total"


class Supervised:
    """One supervisor and its processes."""

    def __init__(self, world: World, *arguments: str, size: int = FLEET) -> None:
        """Not started."""
        self._world = world
        self._size = size
        self.place: Served = world.worker("supervisor", "--processes", str(size), *arguments)

    def start(self) -> None:
        """Until all processes are ready."""
        self._world.keep(self.place)
        until(self.is_whole, "not all processes are ready", self.place.last_lines)

    def is_whole(self) -> bool:
        answer = get(self.place.port, "/readyz")
        return answer.status == 200 and answer.body.startswith(f"{self._size} of {self._size} ")

    def pids(self) -> set[int]:
        """Of its processes."""
        tasks = Path(f"/proc/{self.place.pid}/task").glob("*/children")
        return {int(pid) for task in tasks for pid in task.read_text().split()}

    def restarts(self, reason: str) -> float:
        return self.place.metrics().value(RESTARTS, reason=reason)

    def holder(self, is_held: Callable[[str], bool]) -> int | None:
        """The process that holds a job of which that is true."""
        return next((pid for pid, held in self.held().items() if any(map(is_held, held))), None)

    def held(self) -> Mapping[int, list[str]]:
        """Ids of the jobs that each process holds, as Redis has it."""
        redis = self._world.queue._redis
        found = {}
        for key in redis.smembers(keys.WORKERS):
            pid, pairs = redis.hget(key, "pid"), redis.smembers(key + b":executions")
            if pid is not None:
                found[int(pid)] = [pair.decode().partition(":")[0] for pair in pairs]
        return found

    def await_replaced(self, pid: int) -> float:
        """Seconds until this process is none of its any more, and all are ready."""
        complaint = f"process {pid} is not replaced"
        return until(lambda: pid not in self.pids() and self.is_whole(), complaint, self.place.last_lines)


def signalled_restart(world: World, per_s: float, calm_s: float) -> list[Finding]:
    finding = Finding(
        "Rolling restart by a supervisor",
        [f"`embedq worker --processes {FLEET}`, {per_s:g} jobs/s. It gets SIGHUP and replaces its processes."],
    )
    supervised = Supervised(world)
    supervised.start()
    before = supervised.pids()
    with world.load("hangup", per_s) as load:
        world.await_flow(load)
        pause(calm_s)
        first = world.now()
        supervised.place.signal(signal.SIGHUP)
        took_s = until(
            lambda: not before & supervised.pids() and len(supervised.pids()) == FLEET and supervised.is_whole(),
            "the processes are not replaced",
            supervised.place.last_lines,
        )
        last = world.now()
        pause(calm_s)
    account = world.settle(load.ids())
    finding.tell("seconds until all were replaced", f"{took_s:.1f}")
    tell_jobs(finding, account)
    finding.tell("processes that wrote results", len(account.by_worker))
    finding.check_at_most("longest time without a finished job", account.largest_gap_s(first, last), MAX_GAP_S)
    return [finding]


def killed_process(world: World, per_s: float) -> list[Finding]:
    finding = Finding(
        "A supervised process is killed",
        [f"`embedq worker --processes {FLEET}`, {per_s:g} jobs/s. One process gets SIGKILL with jobs in hand."],
    )
    supervised = Supervised(world)
    supervised.start()
    with world.load("kill", per_s) as load:
        world.await_flow(load)
        restarts = supervised.restarts("exit")
        pid, held = _stop_a_holder(supervised)
        killed_at = world.now()
        os.kill(pid, signal.SIGKILL)
        back_s = supervised.await_replaced(pid)
        pause(2 * LEASE_S)
    account = world.settle(load.ids())
    finding.check_at_most("until all processes were ready again", back_s, MAX_BACK_S)
    finding.check("jobs that it held", len(held), "some", bool(held))
    recovered_s = max(finish_times(world.queue, held)) - killed_at
    finding.check_at_most("until the last of them was done", recovered_s, LEASE_S + MAX_RECOVERY_S)
    more = supervised.restarts("exit") - restarts
    finding.check(f'{RESTARTS}{{reason="exit"}}', f"+{more:g}", "+1", more == 1)
    tell_jobs(finding, account)
    return [finding]


def _stop_a_holder(supervised: Supervised) -> tuple[int, list[str]]:
    """A process that stands still with jobs in hand, and those."""
    while True:
        pid = next(iter(supervised.pids()))
        os.kill(pid, signal.SIGSTOP)
        if held := supervised.held().get(pid):
            return pid, held
        os.kill(pid, signal.SIGCONT)
        pause(0.05)


def hanging_process(world: World, per_s: float) -> list[Finding]:
    finding = Finding(
        "Processes hang",
        [
            f"A worker, and `embedq worker --processes {FLEET}`, with --liveness-timeout-s {LIVENESS_S:g}; {per_s:g}"
            " jobs/s. The encoder hangs on a text; later a process gets SIGSTOP.",
        ],
    )
    _hang_alone(world, finding)
    arguments = ["--liveness-timeout-s", str(LIVENESS_S), "--hang-timeout-s", str(SILENT_S)]
    supervised = Supervised(world, *arguments)
    supervised.start()
    with world.load("hang", per_s) as load:
        world.await_flow(load)
        _hang(world, finding, supervised)
        world.await_flow(load)
        _stand_still(finding, supervised)
        world.await_flow(load)
    tell_jobs(finding, world.settle(load.ids()))
    return [finding]


def _hang_alone(world: World, finding: Finding) -> None:
    with world.worker("alone", "--liveness-timeout-s", str(LIVENESS_S)) as worker:
        worker.await_ready()
        job = world.queue.enqueue(harmful("hang", "alone"), retries=0)
        until(lambda: job.status() == "started", "nobody takes the job")
        red_s = until(lambda: not worker.is_live(), "/livez does not turn red")
        finding.check_at_most("/livez red after the encoder hung", red_s, LIVENESS_S + RED_WITHIN_S)
        finding.tell("what it says", get(worker.port, "/livez").body.strip())
        live = worker.metrics().value("embedq_live")
        finding.check("embedq_live", f"{live:g}", "0", live == 0)
        worker.kill()
    until(lambda: world.queue.statuses([job.id])[job.id] in ("started", "failed"), "the job is lost")


def _hang(world: World, finding: Finding, supervised: Supervised) -> None:
    """A text that hangs the encoder whenever it is tried."""
    restarts = supervised.restarts("hung")
    job = world.queue.enqueue(harmful("hang", "supervised"), retries=1, job_id="hanging")
    until(lambda: supervised.holder(lambda held: held == job.id) is not None, "nobody takes the job")
    pid = supervised.holder(lambda held: held == job.id)
    assert pid is not None  # as waited for
    replaced_s = until(
        lambda: pid not in supervised.pids() and len(supervised.pids()) == FLEET,
        f"process {pid} is not replaced",
        supervised.place.last_lines,
    )
    finding.check_at_most("hung process replaced", replaced_s, LIVENESS_S + MAX_REPLACED_S)
    began_at = time.monotonic()
    await_ends(world.queue, [job.id])
    finding.tell("seconds until its job had failed on its last attempt", f"{time.monotonic() - began_at:.1f}")
    until(supervised.is_whole, "not all processes are ready", supervised.place.last_lines)
    more = supervised.restarts("hung") - restarts
    finding.check(f'{RESTARTS}{{reason="hung"}} by a job of two attempts', f"+{more:g}", "+2", more == 2)
    [outcome] = world.queue.results([job.id], timeout=0).values()
    is_named = isinstance(outcome, JobFailedError) and outcome.text_index == 0
    finding.check("what its client is told", str(outcome), "failed, naming the text", is_named)


def _stand_still(finding: Finding, supervised: Supervised) -> None:
    restarts = supervised.restarts("hung")
    pid, held = _stop_a_holder(supervised)
    replaced_s = supervised.await_replaced(pid)
    finding.tell("jobs held by the process that was stopped", len(held))
    finding.check_at_most("stopped process replaced, all ready", replaced_s, SILENT_S + MAX_REPLACED_S)
    more = supervised.restarts("hung") - restarts
    finding.check(f'{RESTARTS}{{reason="hung"}} by SIGSTOP', f"+{more:g}", "+1", more == 1)
