"""`python -m tests.chaos.poison_drill`: 200 poison jobs among 20,000 good ones, workers as processes that are started
again when they exit. Exit status 1 unless it ends as it must.

Exactly the poison jobs fail, each with its kind's code and the place of the guilty text; every other vector is right;
and once the last poison job is done the queue is as fast as before the first. Good jobs come in three parts of which
the poison is in the second, so that the first and the third tell what the fleet can do without it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from embedq.model import NoopEncoder
from embedq.producer import EmbedQueue, JobFailedError, keys
from embedq.producer.outcomes import Outcome
from embedq.worker.redis_server import RedisServer
from tests.chaos.drill_report import markdown, tell
from tests.chaos.fleet import Fleet
from tests.chaos.poison_worker import HARMS, MARK

MODEL = "noop:128"
QUEUE = "embed"
#: The failure's code by kind of poison.
CODES: Mapping[str, str] = {
    "raise": "encode_failed",
    "nan": "non_finite",
    "oom": "out_of_memory",
    "abort": JobFailedError.ABANDONED,
    "hang": "hung",
}
#: Of the poison jobs of a kind one in so many has several texts, of which one is guilty.
LARGE_EVERY, LARGE_TEXTS = 4, 5
#: A second attempt is a poison job's last: the good ones have the client's default.
POISON_RETRIES = 1
#: Of the good jobs, the shares of the three parts.
PARTS = (0.4, 0.2, 0.4)
#: Seconds: short, as workers die by the dozen. With the default lease it would end the same way, but later.
LEASE_S, ENCODE_TIMEOUT_S = 1.0, 3.0
#: So few that windows are measured to a few hundredths: jobs are done by the micro-batch.
MAX_BATCH_TOKENS = 256
#: Jobs enqueued, or fetched, in one call.
CHUNK_JOBS = 1000
#: Windows in which a part's throughput is measured; the first and the last are left out.
WINDOWS = 16
POLL_S = 0.01
#: Seconds for which a worker may still leave after it has told what its last job came to.
SETTLE_S = 6.0
#: Seconds without any job done after which the drill gives up.
SILENCE_S = 120.0
#: Throughput after the last poison job, of that before the first.
MIN_RATIO = 0.95


@dataclass(frozen=True, slots=True)
class Poison:
    kind: str
    texts: tuple[str, ...]
    text_index: int
    job_id: str


@dataclass(slots=True)
class Findings:
    num_good: int
    poison: Sequence[Poison]
    num_workers: int
    #: jobs a second in each window of the first part and of the last
    rates: tuple[list[float], list[float]]
    #: seconds from the first poison job to the end of the last
    poisoned_s: float
    exits: Counter[int]
    redis_version: str
    wrong: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        before, after = map(statistics.median, self.rates)
        return after / before


def poison_jobs(number: int) -> list[Poison]:
    """Of each kind in equal parts, the kinds mixed."""
    kinds = itertools.cycle(HARMS)
    return [_poison(next(kinds), place) for place in range(number)]


def _poison(kind: str, place: int) -> Poison:
    is_large = place // len(HARMS) % LARGE_EVERY == LARGE_EVERY - 1
    texts = [f"an innocent text of {place}, number {number}" for number in range(LARGE_TEXTS if is_large else 1)]
    guilty = place % len(texts)
    texts[guilty] = f"{MARK}{kind} text of {place}"
    return Poison(kind, tuple(texts), guilty, f"poison-{place}")


def run(num_good: int, num_poison: int, num_workers: int, say: Callable[[str], None]) -> Findings:
    with tempfile.TemporaryDirectory(prefix="eq-") as name:
        folder = Path(name)
        with RedisServer(folder) as server, EmbedQueue(server.url) as queue:
            arguments = ["-m", "tests.chaos.poison_worker", "worker", "--url", server.url, "--model", MODEL]
            arguments += ["--lease-s", str(LEASE_S), "--encode-timeout-s", str(ENCODE_TIMEOUT_S)]
            arguments += ["--max-batch-tokens", str(MAX_BATCH_TOKENS)]
            with Fleet(num_workers, arguments, folder) as fleet:
                return _Drill(queue, fleet, num_good, poison_jobs(num_poison), num_workers, say).run()


class _Drill:
    def __init__(
        self,
        queue: EmbedQueue,
        fleet: Fleet,
        num_good: int,
        poison: Sequence[Poison],
        num_workers: int,
        say: Callable[[str], None],
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._poison = poison
        self._num_workers = num_workers
        self._say = say
        self._texts = [f"good text number {place} of some words" for place in range(num_good)]
        self._redis = queue._redis

    def run(self) -> Findings:
        ends = [0, *itertools.accumulate(int(share * len(self._texts)) for share in PARTS[:2]), len(self._texts)]
        parts = [self._texts[start:end] for start, end in itertools.pairwise(ends)]
        before = self._throughput(parts[0])
        self._say(f"without poison: {statistics.median(before):,.0f} jobs/s")
        began_at = time.monotonic()
        self._enqueue_poisoned(parts[1])
        self._wait(lambda: self._num_done() == ends[2] + len(self._poison))
        poisoned_s = time.monotonic() - began_at
        self._say(f"with poison: {poisoned_s:.0f} s, workers' exits {dict(self._fleet.exits)}")
        after = self._throughput(parts[2])
        self._say(f"after it: {statistics.median(after):,.0f} jobs/s")
        redis_version = self._redis.info("server")["redis_version"]
        found = Findings(
            *(len(self._texts), self._poison, self._num_workers, (before, after), poisoned_s),
            *(self._fleet.exits, redis_version),
        )
        found.wrong = [*self._wrong_good(), *self._wrong_poison()]
        return found

    def _enqueue(self, texts: Sequence[str]) -> None:
        self._queue.enqueue_many(texts, job_ids=map(_good_id, texts))

    def _enqueue_poisoned(self, good: Sequence[str]) -> None:
        """The poison jobs at equal distances."""
        step = max(1, len(good) // len(self._poison))
        for place, poison in enumerate(self._poison):
            self._enqueue(good[place * step : (place + 1) * step])
            self._queue.enqueue(list(poison.texts), job_id=poison.job_id, retries=POISON_RETRIES)
        self._enqueue(good[len(self._poison) * step :])

    def _throughput(self, texts: Sequence[str]) -> list[float]:
        """Jobs a second in each window, once every worker is there."""
        time.sleep(SETTLE_S)
        self._wait(self._is_fleet_complete)
        done_before = self._num_done()
        self._enqueue(texts)
        marks: list[tuple[float, int]] = []

        def is_done() -> bool:
            done = self._num_done() - done_before
            if not marks or done - marks[-1][1] >= len(texts) // WINDOWS:
                marks.append((time.perf_counter(), done))
            return done == len(texts)

        self._wait(is_done)
        return [
            (done - done_earlier) / (at - earlier)
            for (earlier, done_earlier), (at, done) in itertools.islice(itertools.pairwise(marks), 1, len(marks) - 1)
        ]

    def _is_fleet_complete(self) -> bool:
        """Workers' names have their process ids."""
        names = [key.decode().split(".") for key in self._redis.smembers(keys.WORKERS)]
        return set(map(str, self._fleet.pids)) <= {part for name in names for part in name}

    def _num_done(self) -> int:
        return int(self._redis.zcard(keys.finished(QUEUE)) + self._redis.zcard(keys.failed(QUEUE)))

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Raises TimeoutError with the workers' logs if nothing goes on."""
        num_done, since = self._num_done(), time.monotonic()
        while not is_done():
            time.sleep(POLL_S)
            if (now_done := self._num_done()) != num_done:
                num_done, since = now_done, time.monotonic()
            elif time.monotonic() - since > SILENCE_S:
                raise TimeoutError(f"no job was done in {SILENCE_S:g} s; {num_done} are:\n{self._fleet.log()}")

    def _outcomes(self, ids: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        for start in range(0, len(ids), CHUNK_JOBS):
            yield from self._queue.results(ids[start : start + CHUNK_JOBS], timeout=0).items()

    def _wrong_good(self) -> Iterator[str]:
        encoder = NoopEncoder.parse(MODEL)
        wanted = encoder.postprocess(encoder.encode_tokens(encoder.tokenize(self._texts)))
        outcomes = self._outcomes([_good_id(text) for text in self._texts])
        for (job_id, outcome), vector in zip(outcomes, wanted, strict=True):
            if isinstance(outcome, Exception):
                yield f"{job_id}: {outcome}"
            elif not np.array_equal(outcome.vectors[0], vector):
                yield f"{job_id}: another vector"

    def _wrong_poison(self) -> Iterator[str]:
        failed = {entry.decode() for entry in self._redis.zrange(keys.failed(QUEUE), 0, -1)}
        if failed != {poison.job_id for poison in self._poison}:
            yield f"{len(failed)} jobs in the failed registry"
        outcomes = dict(self._outcomes([poison.job_id for poison in self._poison]))
        for poison in self._poison:
            outcome = outcomes[poison.job_id]
            if not isinstance(outcome, JobFailedError):
                yield f"{poison.job_id} ({poison.kind}) did not fail: {outcome!r:.100}"
            elif (outcome.code, outcome.text_index) != (CODES[poison.kind], poison.text_index):
                yield f"{poison.job_id} ({poison.kind}, text {poison.text_index}): {outcome}"


def _good_id(text: str) -> str:
    return f"good-{text.split()[3]}"


def report(found: Findings) -> str:
    before, after = found.rates
    kinds = Counter(poison.kind for poison in found.poison)
    large = sum(len(poison.texts) > 1 for poison in found.poison)
    exits = ", ".join(f"{number} with {status}" for status, number in sorted(found.exits.items()))
    rows = [
        ("good jobs", f"{found.num_good:,}"),
        ("poison jobs", ", ".join(f"{number} {kind}" for kind, number in kinds.items())),
        ("of them with one guilty text of several", f"{large}"),
        ("not as they must be", f"{len(found.wrong)}"),
        ("seconds with poison", f"{found.poisoned_s:,.0f}"),
        ("workers that exited", exits or "none"),
        ("jobs/s before the first poison job", f"{statistics.median(before):,.0f}"),
        ("jobs/s after the last one", f"{statistics.median(after):,.0f}"),
        ("after to before", f"{found.ratio:.3f}"),
    ]
    notes = [
        f"{found.num_workers} workers, leases of {LEASE_S:g} s, the watchdog waits {ENCODE_TIMEOUT_S:g} s; an encoder"
        f" that takes the same time for the same texts. Medians of some {WINDOWS} windows.",
    ]
    return markdown("Poison jobs", found.redis_version, notes, ("drill", "found"), rows)


@click.command()
@click.option("--good", default=20_000, show_default=True, type=click.IntRange(min=100))
@click.option("--poison", default=200, show_default=True, type=click.IntRange(min=len(HARMS)))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--report", "to", type=click.Path(path_type=Path, dir_okay=False), help="File for the table.")
def main(good: int, poison: int, workers: int, to: Path | None) -> None:
    """Poison jobs among good ones."""
    found = run(good, poison, workers, lambda line: click.echo(line, err=True))
    tell(report(found), to)
    for line in found.wrong:
        click.echo(line, err=True)
    sys.exit(bool(found.wrong) or found.ratio < MIN_RATIO)


if __name__ == "__main__":
    main()
