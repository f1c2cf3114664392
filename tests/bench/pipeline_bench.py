"""What the queue costs a real encoder: the same texts through `SentenceEncoder.encode` and through queue and worker.

One encoder object and one thread count for both sides, in one process; a private Redis beside it. Tokens are those that
the model sees, special ones included.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from embedq.model import SentenceEncoder
from embedq.model.bench_report import table
from embedq.model.samples import corpus
from embedq.producer import EmbedQueue, keys
from embedq.producer.connection import connect
from embedq.worker import EmbedWorker, WorkerSettings
from embedq.worker.redis_server import RedisServer
from tests.bench import measure

MODEL = "all-mpnet-base-v2"
NUM_TEXTS = 600
ROUNDS = 5


class Comparison:
    """Both sides on the same texts."""

    def __init__(self, encoder: SentenceEncoder, queue: EmbedQueue, texts: Sequence[str]) -> None:
        self._encoder = encoder
        self._queue = queue
        self._texts = texts
        self._num_tokens = sum(text.num_tokens for text in encoder.tokenize(texts))
        #: of each run of the worker: the share of the time with work in which the device waited
        self.starved: list[float] = []

    def alone(self) -> float:
        """Tokens a second of the library."""
        return self._num_tokens / measure.seconds(lambda: self._encoder.encode(self._texts))

    def queued(self) -> float:
        """Tokens a second through the queue, one job a text: from the worker's first claim to its last result."""
        self._queue._client.flushall()
        self._work()  # with nothing to do: what starting and stopping takes
        empty_s = measure.seconds(self._work)
        self._queue.enqueue_many(self._texts)
        began_at = time.perf_counter()
        worker = self._work()
        took_s = time.perf_counter() - began_at - empty_s
        done = self._queue._redis.zcard(keys.finished(self._queue.name))
        if done != len(self._texts):
            raise RuntimeError(f"{done} of {len(self._texts)} jobs are finished: the figure would mean nothing")
        self.starved.append(worker.pipeline.device_time.starved_share)
        return self._num_tokens / took_s

    def _work(self) -> EmbedWorker:
        worker = EmbedWorker([self._queue.name], connection=self._queue._client, settings=WorkerSettings(model=MODEL))
        with mock.patch("embedq.worker.worker.load_encoder", return_value=self._encoder):
            worker.work(burst=True)
        return worker


def pipeline_text(rounds: int) -> str:
    logging.disable(logging.INFO)
    encoder = SentenceEncoder.load(MODEL)
    texts = corpus("mixed", NUM_TEXTS, lambda some: [text.num_tokens for text in encoder.tokenize(some)])
    with tempfile.TemporaryDirectory(prefix="eq-") as folder, RedisServer(Path(folder)) as server:
        comparison = Comparison(encoder, EmbedQueue(connection=connect(server.url)), texts)
        encoder.encode(texts[:64])
        rates = {"SentenceEncoder.encode": comparison.alone, "queue and worker": comparison.queued}
        rows = measure.interleaved(rates, rounds)
    cells = [
        (
            row.name,
            f"{row.median:,.0f}",
            f"{row.lowest:,.0f} to {row.highest:,.0f}",
            f"{row.median / rows[0].median:.3f}",
        )
        for row in rows
    ]
    head = (f"{MODEL}, {encoder.placement}, tokens/s", "median", "lowest to highest", "to encode")
    share = statistics.median(comparison.starved)
    return (
        f"## What the queue costs a real encoder\n\n{NUM_TEXTS} texts of mixed length, one a job, through the same"
        " encoder object with the same threads; client, worker and server share the cores. The device waited"
        f" {share:.2%} of the time in which the queue had work.\n\n{table(head, cells)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    print(pipeline_text(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
