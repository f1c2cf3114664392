"""`python -m tests.chaos.soak --jobs 1000000`: a million jobs of one text through one worker, a day's work in minutes,
and whether anything is left of them. Exit status 1 if so.

Measured at rest, after a warm-up and at the end: the worker's resident memory, its file descriptors and threads;
Redis' memory and its keys. The client enqueues as fast as results come (`embed_stream`), reads and deletes them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from embedq.model import NoopEncoder
from embedq.producer import EmbedQueue, keys
from embedq.worker.redis_server import RedisServer
from tests.chaos.drill_report import markdown, tell
from tests.chaos.fleet import Fleet, Footprint

MODEL = "noop:768"
#: Jobs after which caches are full and the allocator has what it needs; in bursts, as a thread, its share of the heap
#: and its connection are made when it has something to do for the first time.
WARM_UP_JOBS, WARM_UP_BURSTS = 50_000, 10
#: Texts under way; in the warm-up so many that every thread is busy.
WINDOW_TEXTS, WARM_UP_WINDOW_TEXTS = 4096, 65_536
#: One result in so many is compared with the reference.
CHECK_EVERY = 1000
#: Seconds in which a worker without jobs comes to rest, and Redis gives back the buffers of closed connections.
REST_S = 3.0
#: Growth over the run that is no leak: of the worker's memory, and of Redis'.
MAX_RSS_GROWTH, MAX_REDIS_GROWTH = 0.05, 0.05
#: Connections that come late and stay: a pool opens one when more threads than ever need one at the same moment.
MAX_MORE_CONNECTIONS = 3
#: What RQ's maintenance leaves for some minutes, so that nobody else does it.
LOCKS = f"{keys.PREFIX}:clean_"
#: Progress is told so many times.
TELLINGS = 20


@dataclass(frozen=True, slots=True)
class AtRest:
    """What is there while nothing is to be done."""

    worker: Footprint
    redis_bytes: int
    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class Findings:
    num_jobs: int
    took_s: float
    before: AtRest
    after: AtRest
    #: highest memory of the worker seen under way, in bytes
    peak_rss_bytes: int
    redis_version: str

    @property
    def rss_growth(self) -> float:
        return self.after.worker.rss_bytes / self.before.worker.rss_bytes - 1

    @property
    def redis_growth(self) -> float:
        return self.after.redis_bytes / self.before.redis_bytes - 1

    @property
    def leaks(self) -> list[str]:
        before, after = self.before, self.after
        found = []
        if self.rss_growth >= MAX_RSS_GROWTH:
            found.append(f"the worker's memory grew by {self.rss_growth:.1%}")
        if self.redis_growth > MAX_REDIS_GROWTH:
            found.append(f"Redis' memory grew by {self.redis_growth:.1%}")
        if before.keys != after.keys:
            found.append(f"keys that came or went: {', '.join(sorted(before.keys ^ after.keys)[:10])}")
        if before.worker.num_threads != after.worker.num_threads:
            found.append("the worker's threads are not as many as before")
        if after.worker.num_fds > before.worker.num_fds + MAX_MORE_CONNECTIONS:
            found.append(f"the worker opened {after.worker.num_fds - before.worker.num_fds} files that it left open")
        return found


def run(num_jobs: int, warm_up_jobs: int, say: Callable[[str], None]) -> Findings:
    """Raises AssertionError for a wrong vector."""
    with tempfile.TemporaryDirectory(prefix="eq-") as name:
        folder = Path(name)
        with RedisServer(folder) as server, EmbedQueue(server.url) as queue:
            arguments = ["-m", "embedq.worker.cli", "worker", "--url", server.url, "--model", MODEL]
            with Fleet(1, arguments, folder) as fleet:
                return _Soak(queue, fleet, say).run(num_jobs, warm_up_jobs)


class _Soak:
    def __init__(self, queue: EmbedQueue, fleet: Fleet, say: Callable[[str], None]) -> None:
        self._queue = queue
        self._fleet = fleet
        self._say = say
        self._redis: Any = queue._redis
        self._encoder = NoopEncoder.parse(MODEL)
        self._peak_rss_bytes = 0

    def run(self, num_jobs: int, warm_up_jobs: int) -> Findings:
        self._at_rest()  # Redis keeps statistics of each command from its first call on
        for burst in range(WARM_UP_BURSTS):
            self._work(warm_up_jobs // WARM_UP_BURSTS, f"warm-up {burst}", WARM_UP_WINDOW_TEXTS, tellings=1)
        before = self._at_rest()
        self._peak_rss_bytes = 0
        began_at = time.monotonic()
        self._work(num_jobs, "soak")
        took_s = time.monotonic() - began_at
        after = self._at_rest()
        if self._fleet.exits:
            raise RuntimeError(f"the worker ended: {dict(self._fleet.exits)}\n{self._fleet.log()}")
        redis_version = self._redis.info("server")["redis_version"]
        return Findings(num_jobs, took_s, before, after, self._peak_rss_bytes, redis_version)

    def _work(self, number: int, what: str, window: int = WINDOW_TEXTS, tellings: int = TELLINGS) -> None:
        tell_every = max(1, number // tellings)
        began_at = time.monotonic()
        texts = (f"{what} text number {place}" for place in range(number))
        stream = self._queue.embed_stream(texts, window=window, texts_per_job=1, ordered=False)
        for done, item in enumerate(stream, 1):
            if item.index % CHECK_EVERY == 0:
                self._check(f"{what} text number {item.index}", item.vector)
            if done % tell_every == 0:
                rss_bytes = Footprint.of(self._fleet.pids[0]).rss_bytes
                self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes)
                rate = done / (time.monotonic() - began_at)
                self._say(f"{what}: {done:,} jobs, {rate:,.0f} jobs/s, the worker has {_megabytes(rss_bytes)}")

    def _check(self, text: str, vector: Any) -> None:
        encoder = self._encoder
        [wanted] = encoder.postprocess(encoder.encode_tokens(encoder.tokenize([text])))
        assert np.array_equal(vector, wanted), f"{text!r} has another vector"

    def _at_rest(self) -> AtRest:
        self._redis.slowlog_reset()  # Redis' own diary, of at most 128 commands
        time.sleep(REST_S)
        memory = self._redis.info("memory")
        redis_bytes = memory["used_memory"] - memory["mem_clients_normal"] - memory["mem_aof_buffer"]
        all_keys = (key.decode() for key in self._redis.scan_iter(count=1000))
        found = frozenset(key for key in all_keys if not key.startswith(LOCKS))
        return AtRest(Footprint.of(self._fleet.pids[0]), int(redis_bytes), found)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def report(found: Findings) -> str:
    before, after = found.before, found.after
    rows = [
        (
            "worker's resident memory",
            _megabytes(before.worker.rss_bytes),
            _megabytes(after.worker.rss_bytes),
            f"{found.rss_growth:+.1%}",
        ),
        (
            "Redis' memory without its clients' buffers",
            _megabytes(before.redis_bytes),
            _megabytes(after.redis_bytes),
            f"{found.redis_growth:+.1%}",
        ),
        *(
            (name, str(earlier), str(later), f"{later - earlier:+}")
            for name, earlier, later in (
                ("keys in Redis", len(before.keys), len(after.keys)),
                ("worker's file descriptors", before.worker.num_fds, after.worker.num_fds),
                ("worker's threads", before.worker.num_threads, after.worker.num_threads),
            )
        ),
    ]
    rate = found.num_jobs / found.took_s
    notes = [
        f"{found.num_jobs:,} jobs of one text through one worker ({MODEL}) in {found.took_s:,.0f} s, {rate:,.0f} a s.",
        f"At rest, after a warm-up and after the jobs; highest meanwhile: {_megabytes(found.peak_rss_bytes)}.",
    ]
    return markdown("Soak", found.redis_version, notes, ("at rest", "before", "after", "change"), rows)


@click.command()
@click.option("--jobs", default=1_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--warm-up", default=WARM_UP_JOBS, show_default=True, type=click.IntRange(min=1))
@click.option("--report", "to", type=click.Path(path_type=Path, dir_okay=False), help="File for the table.")
def main(jobs: int, warm_up: int, to: Path | None) -> None:
    """Many jobs, and what is left of them."""
    found = run(jobs, warm_up, lambda line: click.echo(line, err=True))
    tell(report(found), to)
    for leak in found.leaks:
        click.echo(leak, err=True)
    sys.exit(bool(found.leaks))


if __name__ == "__main__":
    main()
