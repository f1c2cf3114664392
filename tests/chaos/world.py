"""Everything that runs: Redis with its file, the bad network, workers and producers, each started again when it dies.

Knows processes and signals and writes down what it does; says nothing of jobs. For one thread, the one that outlives
all others: the kernel ends its children with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedq.producer.connection import connect
from embedq.worker import processes
from embedq.worker.redis_server import CONFIGURATION, RedisServer, free_port
from tests.chaos.checks import MODEL, Deaths
from tests.chaos.plan import ENCODE_TIMEOUT_S, GRACE_S, LEASE_S, NUM_WORKERS, Plan, Producer
from tests.chaos.poison import POISON_EXIT

ROOT = Path(__file__).resolve().parents[2]
#: Seconds until a dead worker or producer is started again.
RESTART_S = 0.3
#: Seconds of a worker's life before which it is neither killed nor counts as one that can take over others' jobs.
GROWN_UP_S = 2.0
#: Seconds within which a killed worker's own end is noticed.
OWN_DEATH_S = 0.5
#: What a worker says once it is.
AT_WORK = b" serves "
#: Tokens of a micro-batch: so few that several are under way.
MAX_BATCH_TOKENS = 1024
#: Beyond what ships: nothing that was acknowledged is lost with the server.
REDIS_SETTINGS = "\nappendfsync always\nauto-aof-rewrite-min-size 32mb\n"
#: Exit statuses with which a worker may end that nobody killed: asked to; grace over; device lost; an encode that hung;
#: poison.
EXPECTED_EXITS = frozenset({0, 3, 7, 8, POISON_EXIT, -signal.SIGABRT})
#: And one that is still starting when the run ends: it leaves at once.
LEFT_AT_START = frozenset({-signal.SIGTERM, 128 + signal.SIGTERM})
#: Seconds that a process gets to end once it was asked to.
STOP_S = GRACE_S + 10
#: Seconds before a job's end in which a death from outside may have been what ended it: a lease, and its recovery.
BLAME_S = 3 * LEASE_S
#: Seconds that a connection to Redis past the proxy waits for an answer.
DIRECT_TIMEOUT_S = 20.0


@dataclass(slots=True, eq=False)
class Worker:
    """One place; its process changes."""

    place: int
    number: int = 0
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    starts_at: float = 0.0
    is_stopped: bool = False
    was_killed: bool = False
    #: whether it has said so: before, a signal meets a process that is still importing
    is_at_work: bool = False

    @property
    def name(self) -> str:
        return f"w{self.place}-{self.number}"

    def is_able(self, now: float) -> bool:
        return self.is_at_work and not self.is_stopped and now - self.started_at > GROWN_UP_S


@dataclass(slots=True, eq=False)
class Maker:
    """A producer's process."""

    producer: Producer
    process: subprocess.Popen[bytes] | None = None
    starts_at: float = 0.0
    is_done: bool = False


@dataclass(slots=True)
class Spans:
    """Spans of time in which something was not there."""

    closed: list[tuple[float, float]] = field(default_factory=list)
    open_since: float | None = None

    def begin(self) -> None:
        if self.open_since is None:
            self.open_since = time.time()

    def end(self) -> None:
        if self.open_since is not None:
            self.closed.append((self.open_since, time.time()))
            self.open_since = None

    def meet(self, first: float, last: float) -> bool:
        """Whether any of them shares a moment with this one."""
        if self.open_since is not None and self.open_since <= last:
            return True
        return any(begin <= last and end >= first for begin, end in list(self.closed))


class World:
    """A context manager. `tick` often; then the faults' own methods."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.events: Counter[str] = Counter()
        self.exits: Counter[int] = Counter()
        self.complaints: list[str] = []
        self.redis_away = Spans()
        self.nobody_able = Spans()
        #: of everything that costs attempts, and of what the suite itself did
        self._death_times: list[float] = []
        self._harm_times: list[float] = []
        self.workers = [Worker(place) for place in range(NUM_WORKERS)]
        self.makers = [Maker(producer) for producer in plan.producers]
        self.is_ending = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "redis.conf"
        configuration.write_text(CONFIGURATION.read_text() + REDIS_SETTINGS)
        self.redis = RedisServer(self.folder / "redis", port=0, durable=True, configuration=configuration)
        self.redis.start()
        self.direct = connect(self.redis.url, socket_timeout=DIRECT_TIMEOUT_S)
        self._start_proxy()
        self.started_at = time.time()
        self.nobody_able.begin()
        self.tick()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._processes():
            if process.poll() is None:
                process.kill()
                process.send_signal(signal.SIGCONT)
                process.wait()
        self._proxy.terminate()
        self._proxy.wait()
        self.direct.close()
        self.redis.stop()

    # --- watching

    def tick(self) -> None:
        """Notes who died, and starts them again."""
        now = time.time()
        for worker in self.workers:
            self._reap(worker, now)
            if worker.process is None and not self.is_ending and now >= worker.starts_at:
                self._start_worker(worker)
        for maker in self.makers:
            self._reap_maker(maker, now)
            if maker.process is None and not maker.is_done and now >= maker.starts_at:
                self._start_maker(maker)
        able = any(worker.is_able(now) for worker in self.workers)
        (self.nobody_able.end if able else self.nobody_able.begin)()

    def deaths(self, first: float, last: float) -> Deaths:
        """Of workers, and of leases that ran out while nobody died."""
        all_of_them = sum(1 for moment in self._death_times if moment >= first)
        lately = last - BLAME_S
        return Deaths(all_of_them, sum(1 for moment in self._harm_times if lately <= moment <= last + 1))

    def is_undisturbed(self, first: float, last: float) -> bool:
        return not (self.redis_away.meet(first, last) or self.nobody_able.meet(first, last))

    def is_calm(self, first: float, last: float) -> bool:
        """The same, and no other worker died than the one whose end began it."""
        others = (moment for moment in self._death_times if first + OWN_DEATH_S < moment <= last)
        return self.is_undisturbed(first, last) and not any(others)

    def note(self, what: str, **more: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as log:
            log.write(json.dumps({"at": round(time.time(), 3), "what": what, **more}) + "\n")

    def able_worker(self, place: int) -> Worker | None:
        """The first from this place on that is at work."""
        now = time.time()
        order = (self.workers[(place + step) % NUM_WORKERS] for step in range(NUM_WORKERS))
        return next((worker for worker in order if worker.is_able(now)), None)

    # --- doing harm

    def kill_worker(self, worker: Worker) -> None:
        worker.was_killed = True
        self._signal(worker.process, signal.SIGKILL)

    def pause(self, worker: Worker) -> None:
        worker.is_stopped = True
        self._count_harm()
        self.note("stopped", who=worker.name)
        self._signal(worker.process, signal.SIGSTOP)

    def resume(self, worker: Worker, process: subprocess.Popen[bytes] | None) -> None:
        """If it is still the same process."""
        if worker.process is process:
            worker.is_stopped = False
            self._harm_times.append(time.time())
            self.note("continued", who=worker.name)
            self._signal(process, signal.SIGCONT)

    def terminate(self, worker: Worker) -> None:
        self._signal(worker.process, signal.SIGTERM)

    def kill_maker(self, maker: Maker) -> None:
        self._signal(maker.process, signal.SIGKILL)

    def kill_redis(self) -> None:
        self.redis_away.begin()
        self._count_harm()
        self.redis.kill()

    def start_redis(self) -> None:
        self.redis.start()
        self.note("Redis is back")
        self.redis_away.end()

    def pause_redis(self) -> None:
        self.redis_away.begin()
        self._count_harm()
        os.kill(self.redis.pid, signal.SIGSTOP)

    def resume_redis(self) -> None:
        os.kill(self.redis.pid, signal.SIGCONT)
        self.note("Redis goes on")
        self.redis_away.end()

    def silence(self, for_s: float) -> None:
        self.redis_away.begin()
        self._count_harm()
        self.order(what="stall", for_s=for_s)

    def end_silence(self) -> None:
        self.redis_away.end()

    def order(self, **order: Any) -> None:
        """To the proxy."""
        assert self._proxy.stdin is not None
        self._proxy.stdin.write(json.dumps(order) + "\n")
        self._proxy.stdin.flush()

    # --- ending

    def end_producers(self) -> None:
        """Lets them get answers to what they have under way. They may be waiting for Redis, so this takes a while."""
        for maker in self.makers:
            maker.is_done = True
            self._signal(maker.process, signal.SIGTERM)

    def producers_are_done(self) -> bool:
        return all(maker.process is None for maker in self.makers)

    def end_workers(self) -> None:
        self.is_ending = True
        for worker in self.workers:
            if worker.process is not None and worker.process.poll() is None:
                self._signal(worker.process, signal.SIGTERM)
        give_up_at = time.time() + STOP_S
        while any(worker.process is not None for worker in self.workers) and time.time() < give_up_at:
            self.tick()
            time.sleep(0.05)
        for worker in self.workers:
            if worker.process is not None:
                self.complaints.append(f"{worker.name} did not end within {STOP_S:g} s of SIGTERM")

    def look_for_left_processes(self) -> None:
        """Once this context has ended: nobody runs on who was told of a file in our folder or of our port."""
        marks = (f"{self.folder}{os.sep}".encode(), self.url.encode())
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = process.read_bytes()
                if any(mark in command for mark in marks) and int(process.parent.name) != os.getpid():
                    shown = command.replace(b"\0", b" ").decode(errors="replace")
                    self.complaints.append(f"{process.parent.name} still runs: {shown}")

    # --- processes

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        return [each.process for each in (*self.workers, *self.makers) if each.process is not None]

    def _signal(self, process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def _count_harm(self) -> None:
        """When something begins that may let leases run out: what they cost is seen only after."""
        self._death_times.append(time.time())
        self._harm_times.append(time.time())

    def _reap(self, worker: Worker, now: float) -> None:
        if worker.process is None:
            return
        if (status := worker.process.poll()) is None:
            worker.is_at_work = worker.is_at_work or AT_WORK in self._log_of(worker.name).read_bytes()
            return
        self._death_times.append(now)
        if worker.was_killed:
            self._harm_times.append(now)
        self.exits[status] += 1
        self.note("worker ended", who=worker.name, status=status)
        if not self._is_expected(worker, status):
            log = processes.last_lines(self._log_of(worker.name), 20)
            self.complaints.append(f"{worker.name} ended with status {status}:\n{log}")
        worker.process, worker.starts_at = None, now + RESTART_S
        worker.is_stopped = worker.is_at_work = False

    def _is_expected(self, worker: Worker, status: int) -> bool:
        if status == -signal.SIGKILL:
            return worker.was_killed
        return status in EXPECTED_EXITS or (self.is_ending and not worker.is_at_work and status in LEFT_AT_START)

    def _reap_maker(self, maker: Maker, now: float) -> None:
        if maker.process is None or (status := maker.process.poll()) is None:
            return
        if status not in (0, -signal.SIGKILL):
            log = processes.last_lines(self._log_of(maker.producer.name), 20)
            self.complaints.append(f"producer {maker.producer.name} ended with status {status}:\n{log}")
        maker.process, maker.starts_at = None, now + RESTART_S

    def _start_worker(self, worker: Worker) -> None:
        worker.number += 1
        worker.was_killed = False
        command = ["tests.chaos.poison", "worker", "--url", self.url, "--name", worker.name, "--model", MODEL]
        command += ["--lease-s", str(LEASE_S), "--grace-s", str(GRACE_S), "--max-batch-tokens", str(MAX_BATCH_TOKENS)]
        command += ["--encode-timeout-s", str(ENCODE_TIMEOUT_S)]
        worker.process = self._start(command, worker.name)
        worker.started_at = time.time()
        self.note("worker started", who=worker.name, pid=worker.process.pid)

    def _start_maker(self, maker: Maker) -> None:
        producer = maker.producer
        command = ["tests.chaos.produce", self.url, self.plan.seed, self.started_at, producer.name, producer.kind]
        command += [producer.per_s, producer.group, self.journal_of(producer)]
        maker.process = self._start(command, producer.name)

    def _start(self, module_and_arguments: Sequence[Any], name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *map(str, module_and_arguments)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return processes.start(command, self._log_of(name), {**os.environ, "PYTHONPATH": path})

    def _start_proxy(self) -> None:
        self._proxy = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.proxy", str(self.redis.port), str(free_port())],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._proxy.stdout is not None
        self.url = f"redis://127.0.0.1:{int(self._proxy.stdout.readline())}/0"
        threading.Thread(target=self._listen, name="proxy", daemon=True).start()

    def _listen(self) -> None:
        """Counts what the proxy tells."""
        assert self._proxy.stdout is not None
        for line in self._proxy.stdout:
            told = json.loads(line)
            if told["did"] != "cut":
                self.events[told["did"]] += 1

    def _log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def journal_of(self, producer: Producer) -> Path:
        return self.folder / f"{producer.name}.journal"
