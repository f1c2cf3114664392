"""How a worker ends: by a signal at any moment, by a supervisor that kills, and what becomes of its jobs."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from embedq.producer import EmbedQueue, JobStatus, keys
from embedq.producer.jobs import EmbedJob
from embedq.worker.redis_server import RedisServer
from tests.conftest import until
from tests.queue.test_worker import EMBEDQ, RunningWorker, Start, finished, idle_workers, start, workers  # noqa: F401
from tests.queue.worker_programs import isolated, program, signal_isolated

#: Seconds that `docker stop` waits before it kills.
DOCKER_STOP_S = 10.0
#: Seconds beyond the lease within which another worker has taken up what a dead one held.
RECOVERY_S = 15.0


def slow_device(folder: Path, seconds: float, *, holds_gil: bool = False) -> list[str]:
    """`embedq` with a device that takes so long for a micro-batch, in bursts of a second that may hold the GIL."""
    library = "PyDLL" if holds_gil else "CDLL"
    return program(
        folder,
        "import ctypes, time\n"
        "from embedq.model import NoopEncoder\n"
        "encode = NoopEncoder.encode_tokens\n"
        f"usleep = ctypes.{library}(None).usleep\n"
        "def slow(self, batch):\n"
        "    print('on the device', flush=True)\n"
        f"    ends_at = time.monotonic() + {seconds}\n"
        "    while (left := ends_at - time.monotonic()) > 0:\n"
        "        usleep(int(1e6 * min(1.0, left)))\n"
        "        time.sleep(0.01)\n"
        "    return encode(self, batch)\n"
        "NoopEncoder.encode_tokens = slow\n",
    )


def assert_order_is_kept(queue: EmbedQueue, name: str, jobs: Sequence[EmbedJob]) -> int:
    """What waits on the queue stands there as it was enqueued, and all else is finished; how many that are."""
    waiting = [entry.decode() for entry in queue._redis.lrange(keys.queue(name), 0, -1)]
    done = {job_id for job_id, status in queue.statuses(job.id for job in jobs).items() if status is JobStatus.FINISHED}
    assert waiting == [job.id for job in jobs if job.id not in done]
    assert queue._redis.zcard(keys.started(name)) == 0
    return len(done)


def assert_docker_stops(worker: RunningWorker, *, status: int) -> None:
    """It ends, as process 1, with this status and before it would be killed."""
    asked_at = time.monotonic()
    signal_isolated(worker.process.pid, signal.SIGTERM)
    ended_with, output = worker.ended(DOCKER_STOP_S)
    assert ended_with == status, output
    assert time.monotonic() - asked_at < DOCKER_STOP_S


def test_sigterm_gives_each_queue_its_jobs_back_in_order(queue: EmbedQueue, url: str, start: Start) -> None:  # noqa: F811
    with EmbedQueue(url, queue="urgent") as urgent:
        hasty, others = urgent.enqueue_many(map(str, range(300))), queue.enqueue_many(map(str, range(8_000)))
        worker = start("urgent", "embed", "--max-batch-tokens", "8", "--max-claim-jobs", "3000")
        until(lambda: finished(queue) > 5)
        late = urgent.enqueue_many(map(str, range(8_000)))
        until(lambda: queue._redis.zcard(keys.finished("urgent")) > 305)
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 0, output
        assert 300 < assert_order_is_kept(urgent, "urgent", hasty + late) < 8_300
        assert 5 < assert_order_is_kept(queue, "embed", others) < 8_000
    assert queue._redis.keys("*execution*") == []
    assert workers(queue) == 0


def test_the_micro_batch_on_the_device_is_finished_and_the_rest_given_back(
    queue: EmbedQueue,
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    jobs = queue.enqueue_many(["one two three four"] * 6)
    worker = start("--max-batch-tokens", "12", "--max-claim-jobs", "6", program=slow_device(short_path, 2))
    until(lambda: "on the device" in worker.log.read_text())
    worker.send(signal.SIGTERM)
    status, output = worker.ended()
    assert status == 0, output
    assert output.count("on the device") == 1
    assert 0 < assert_order_is_kept(queue, "embed", jobs) <= 2


@pytest.mark.slow
def test_sigterm_at_any_moment_loses_nothing(queue: EmbedQueue, start: Start) -> None:  # noqa: F811
    """While it claims, tokenizes, encodes, publishes, or has just gone idle; and a few while it starts."""
    draw = random.Random(5)
    jobs = queue.enqueue_many([f"text {number}" for number in range(3_000)])
    for round_number in range(12):
        worker = start("--max-batch-tokens", "64", "--max-claim-jobs", str(draw.choice([1, 20, 500])))
        # Before there are handlers of its own the interpreter ends as any program does.
        until(lambda: workers(queue) == 1)
        time.sleep(draw.uniform(0, 0.4))
        worker.send(signal.SIGTERM)
        status, output = worker.ended()
        assert status == 0, (round_number, output)
        assert "Traceback" not in output
        assert_order_is_kept(queue, "embed", jobs)
        assert workers(queue) == 0
    start("--burst").ended()
    assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.FINISHED}


def test_after_a_sigkill_another_worker_takes_the_jobs_up_within_lease_and_15_s(
    queue: EmbedQueue,
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    jobs = queue.enqueue_many(map(str, range(20)))
    first = start("--lease-s", "2", program=slow_device(short_path, 100))
    until(lambda: "on the device" in first.log.read_text())
    start("--lease-s", "2")
    until(lambda: idle_workers(queue) == 1)
    killed_at = time.monotonic()
    first.send(signal.SIGKILL)
    until(lambda: finished(queue) == len(jobs), timeout_s=2 + RECOVERY_S)
    assert time.monotonic() - killed_at < 2 + RECOVERY_S
    assert set(queue.statuses(job.id for job in jobs).values()) == {JobStatus.FINISHED}


def test_sigterm_while_redis_is_down_leaves_within_the_grace_and_says_what_becomes_of_the_jobs(
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    server = RedisServer(short_path, durable=True)
    with server, EmbedQueue(server.url) as queue:
        jobs = queue.enqueue_many(map(str, range(20)))
        worker = start("--lease-s", "1", "--grace-s", "3", at=server.url, program=slow_device(short_path, 2))
        until(lambda: "on the device" in worker.log.read_text())
        time.sleep(1.2)  # for the log of Redis to reach the disk
        server.kill()
        worker.send(signal.SIGTERM)
        asked_at = time.monotonic()
        status, output = worker.ended()
        assert status == 3, output
        assert time.monotonic() - asked_at < 3 + 4
        assert "not done within the grace of 3 s" in output
        assert "they return when their leases end" in output
        assert "Traceback" not in output
        server.start()
        start("--lease-s", "1", at=server.url)
        until(lambda: finished(queue) == len(jobs), timeout_s=1 + RECOVERY_S)


def test_docker_stop_finds_process_1_gone_in_time(queue: EmbedQueue, short_path: Path, start: Start) -> None:  # noqa: F811
    """Idle, and with the device busy."""
    idle = start(program=isolated(EMBEDQ))
    until(lambda: idle_workers(queue) == 1)
    assert_docker_stops(idle, status=0)
    jobs = queue.enqueue_many(["one two three four"] * 6)
    busy = start("--max-batch-tokens", "12", program=isolated(slow_device(short_path, 3)))
    until(lambda: "on the device" in busy.log.read_text())
    assert_docker_stops(busy, status=0)
    assert 0 < assert_order_is_kept(queue, "embed", jobs) <= 2


def test_a_grace_below_ten_seconds_gives_the_jobs_back_before_docker_kills(
    queue: EmbedQueue,
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    jobs = queue.enqueue_many(map(str, range(6)))
    worker = start("--grace-s", "4", program=isolated(slow_device(short_path, 60)))
    until(lambda: "on the device" in worker.log.read_text())
    assert_docker_stops(worker, status=3)
    assert assert_order_is_kept(queue, "embed", jobs) == 0


@pytest.mark.slow
def test_a_device_that_holds_the_interpreter_for_20_s_in_bursts_loses_no_lease(
    queue: EmbedQueue,
    short_path: Path,
    start: Start,  # noqa: F811
) -> None:
    jobs = queue.enqueue_many(map(str, range(10)))
    first = start("--lease-s", "5", program=slow_device(short_path, 20, holds_gil=True))
    until(lambda: "on the device" in first.log.read_text())
    rival = start("--lease-s", "5")
    until(lambda: idle_workers(queue) == 1)
    lowest_s = 5.0
    while finished(queue) < len(jobs):
        now_s = float(queue._redis.time()[0])
        scores = [score for _, score in queue._redis.zrange(keys.started("embed"), 0, -1, withscores=True)]
        lowest_s = min([lowest_s, *(score - now_s for score in scores)])
        time.sleep(0.2)
    assert {job.result(timeout=5).worker for job in jobs} == {_name(first.log.read_text())}
    assert "tried again" not in rival.log.read_text()
    assert lowest_s > 1.0


def _name(log: str) -> str:
    """A worker's own, from its first line."""
    return log.partition("worker ")[2].split()[0]
