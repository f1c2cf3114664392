"""One run: the plan's faults in their time, the audit beside them, and the last look when all is at rest.

Knows the order of things; what is done is in `world`, what must hold in `checks`.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from embedq.producer import scripts
from tests.chaos.audit import Audit
from tests.chaos.checks import Violation, check_recoveries
from tests.chaos.journal import JournalReader
from tests.chaos.ledger import Ledger
from tests.chaos.plan import Fault, Plan
from tests.chaos.recovery import Recoveries
from tests.chaos.report import Findings
from tests.chaos.world import World

#: Seconds between two looks at the processes, at the jobs, and between two lines of progress.
TICK_S, AUDIT_S, TELL_S = 0.05, 2.0, 10.0
#: Seconds until a fault is tried again whose victim is not there.
POSTPONE_S = 0.25
#: Seconds that everything may take to come to rest after the last fault. What a worker that died left undone after a
#: job's end is taken up after two minutes.
REST_S = 240.0
#: Of the client's scripts and the worker's.
_PACKAGES = dict.fromkeys(("enqueue", "cancel", "requeue"), "embedq.producer")


@dataclass(order=True, slots=True)
class _Step:
    """Something to be done at a moment; `order` decides between two of the same."""

    at: float
    order: int
    action: Callable[[], None] = field(compare=False)


class _Auditing:
    """A context manager: rounds of the audit on a thread of their own, as Redis may keep them waiting."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._error: Exception | None = None
        #: when the last whole round began
        self.round_began_at = 0.0

    def __enter__(self) -> _Auditing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises what ended the audit."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._stop.wait(AUDIT_S):
            began_at = time.time()
            try:
                self.audit.round()
                self.round_began_at = began_at
            except redis.RedisError:
                continue
            except Exception as err:
                self._error = err
                return


class Run:
    """`findings` does it all."""

    def __init__(self, plan: Plan, folder: Path, tell: Callable[[str], None] = print) -> None:
        self._plan = plan
        self._folder = folder
        self._tell = tell
        self._later: list[_Step] = []
        self._order = itertools.count()

    def findings(self) -> Findings:
        with contextlib.ExitStack() as stack:
            world = self._world = stack.enter_context(World(self._plan, self._folder))
            following = Recoveries(world.direct, world.is_undisturbed, world.is_calm)
            recoveries = self._recoveries = stack.enter_context(following)
            ledger = Ledger(self._plan)
            journals = [JournalReader(world.journal_of(producer)) for producer in self._plan.producers]
            audit = Audit(world.direct, ledger, journals, world.deaths)
            version = world.direct.info("server")["redis_version"]
            with _Auditing(audit) as auditing:
                self._auditing = auditing
                self._do_faults(ledger)
                faults_ended_at = time.time()
                self._come_to_rest(ledger)
                rest_s = time.time() - faults_ended_at
            world.end_workers()
            audit.close()
        world.look_for_left_processes()
        complaints = (Violation("process", what.partition(" ")[0], what) for what in world.complaints)
        violations = [*audit.violations, *check_recoveries(recoveries.done), *complaints]
        return Findings(self._plan, ledger, violations, recoveries.done, world.events, world.exits, rest_s, version)

    # --- the faults

    def _do_faults(self, ledger: Ledger) -> None:
        world = self._world
        for fault in self._plan.faults:
            self._at(world.started_at + fault.at_s, functools.partial(self._do, fault))
        self._work_until(lambda: time.time() >= world.started_at + self._plan.seconds, ledger)
        # What lasts, or waits for a victim, ends.
        while self._later:
            heapq.heappop(self._later).action()

    def _work_until(self, is_over: Callable[[], bool], ledger: Ledger) -> None:
        next_tell = time.time() + TELL_S
        while not is_over():
            while self._later and self._later[0].at <= time.time():
                heapq.heappop(self._later).action()
            self._world.tick()
            self._auditing.check()
            if time.time() >= next_tell:
                next_tell += TELL_S
                self._tell(self._progress(ledger))
            time.sleep(TICK_S)

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, _Step(moment, next(self._order), action))

    def _do(self, fault: Fault) -> None:
        if not getattr(self, f"_{fault.kind}")(fault):
            if time.time() < self._world.started_at + self._plan.seconds:
                self._at(time.time() + POSTPONE_S, functools.partial(self._do, fault))
            return
        self._world.events[fault.kind] += 1
        self._world.note(fault.kind, lasts_s=fault.lasts_s, script=fault.script)

    def _kill_worker(self, fault: Fault) -> bool:
        worker = self._world.able_worker(fault.victim)
        if worker is not None:
            self._world.note("killed", who=worker.name)
            self._world.kill_worker(worker)
            self._recoveries.killed(worker.name)
        return worker is not None

    def _stop_worker(self, fault: Fault) -> bool:
        worker = self._world.able_worker(fault.victim)
        if worker is not None:
            self._world.pause(worker)
            self._at(time.time() + fault.lasts_s, functools.partial(self._world.resume, worker, worker.process))
        return worker is not None

    def _term_worker(self, fault: Fault) -> bool:
        worker = self._world.able_worker(fault.victim)
        if worker is not None:
            self._world.terminate(worker)
        return worker is not None

    def _kill_producer(self, fault: Fault) -> bool:
        self._world.kill_maker(self._world.makers[fault.victim])
        return True

    def _kill_redis(self, fault: Fault) -> bool:
        if self._is_redis_away():
            return False
        self._world.kill_redis()
        self._at(time.time() + fault.lasts_s, self._world.start_redis)
        return True

    def _stop_redis(self, fault: Fault) -> bool:
        if self._is_redis_away():
            return False
        self._world.pause_redis()
        self._at(time.time() + fault.lasts_s, self._world.resume_redis)
        return True

    def _is_redis_away(self) -> bool:
        return self._world.redis_away.open_since is not None

    def _cut(self, _: Fault) -> bool:
        self._world.order(what="cut")
        return True

    def _delay(self, fault: Fault) -> bool:
        # As long a delay as the time it lasts has hundredths.
        self._world.order(what="delay", for_s=fault.lasts_s, delay_s=fault.lasts_s / 100)
        return True

    def _stall(self, fault: Fault) -> bool:
        if self._is_redis_away():
            return False
        self._world.silence(fault.lasts_s)
        self._at(time.time() + fault.lasts_s, self._world.end_silence)
        return True

    def _lose_reply(self, fault: Fault) -> bool:
        marker = self._sha(fault.script)
        self._world.order(what=fault.kind, marker=marker, times=fault.times, for_s=fault.lasts_s)
        return True

    _lose_request = _tear = _lose_reply

    @functools.cache  # noqa: B019  (a run lives as long as its process)
    def _sha(self, script: str) -> str:
        package = _PACKAGES.get(script, "embedq.worker")
        return str(scripts.load(self._world.direct, package, script).sha)

    def _script_flush(self, _: Fault) -> bool:
        return self._ask_redis("SCRIPT", "FLUSH")

    def _client_kill(self, _: Fault) -> bool:
        return self._ask_redis("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def _ask_redis(self, *command: str) -> bool:
        if self._is_redis_away():
            return False
        try:
            self._world.direct.execute_command(*command)
        except redis.RedisError:
            return False
        return True

    # --- coming to rest

    def _come_to_rest(self, ledger: Ledger) -> None:
        self._tell("no more faults; waiting for what is under way")
        self._world.end_producers()
        give_up_at = time.time() + REST_S
        self._work_until(lambda: self._world.producers_are_done() or time.time() > give_up_at, ledger)
        if not self._world.producers_are_done():
            self._world.complaints.append(f"a producer got no answer within {REST_S:g} s")
        produced_at = time.time()

        def is_at_rest() -> bool:
            pending = len(ledger.open) + self._auditing.audit.num_sequels
            return self._auditing.round_began_at > produced_at and not pending

        self._work_until(lambda: is_at_rest() or time.time() > give_up_at, ledger)

    def _progress(self, ledger: Ledger) -> str:
        ended, events = ledger.ended, self._world.events
        return (
            f"{time.time() - self._world.started_at:5.0f} s: {len(ledger.accounts):,} jobs, "
            f"{ended['finished']:,} finished,"
            f" {ended['failed']:,} failed, {ended['canceled']:,} canceled, {len(ledger.open):,} open;"
            f" kills: {events['kill_worker']} workers, {events['kill_redis']} Redis;"
            f" lost: {events['lost_request']} requests, {events['lost_reply']} replies;"
            f" recoveries: {len(self._recoveries.done)}"
        )
