"""A producer's process: `python -m tests.ops.produce URL NAME PER_S JOURNAL`, until SIGTERM.

Enqueues at a steady rate and writes down what Redis has accepted. When Redis does not answer it tries again with the
same job ids, and then makes up for the time.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

from embedq.producer import EmbedQueue
from embedq.producer.errors import EmbedqError
from tests.chaos.journal import Journal
from tests.ops.load import job_id, texts_of

#: Seconds between two calls, and between two attempts of one.
EVERY_S, AGAIN_S = 0.05, 0.2
#: Jobs of one call at most: after an outage there are many to make up for.
MAX_JOBS = 200


class Producer:
    def __init__(self, queue: EmbedQueue, name: str, journal: Journal) -> None:
        self._queue = queue
        self._name = name
        self._journal = journal
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(self, per_s: float) -> None:
        began_at, number = time.monotonic(), 0
        while not self._stop.wait(EVERY_S):
            end = min(int((time.monotonic() - began_at) * per_s), number + MAX_JOBS)
            if end > number:
                self._enqueue_at_last(number, end)
                number = end

    def _enqueue_at_last(self, first: int, end: int) -> None:
        """Also when it is stopped meanwhile: it may be that Redis has some of them already."""
        while True:
            try:
                self._enqueue(first, end)
            except EmbedqError as err:
                if not (err.retryable or (isinstance(err.__cause__, EmbedqError) and err.__cause__.retryable)):
                    raise
                self._journal.write(what="again", first=first, end=end, error=err.code)
                time.sleep(AGAIN_S)
            else:
                self._journal.write(what="accepted", first=first, end=end)
                return

    def _enqueue(self, first: int, end: int) -> None:
        ids = [job_id(self._name, number) for number in range(first, end)]
        single = {each: texts[0] for each in ids if len(texts := texts_of(each)) == 1}
        if single:
            self._queue.enqueue_many(list(single.values()), job_ids=list(single))
        for each in ids:
            if each not in single:
                self._queue.enqueue(texts_of(each), job_id=each)


def main(arguments: list[str]) -> None:
    url, name, per_s, journal = arguments
    with EmbedQueue(url) as queue:
        producer = Producer(queue, name, Journal(Path(journal)))
        signal.signal(signal.SIGTERM, lambda *_: producer.stop())
        producer.run(float(per_s))


if __name__ == "__main__":
    main(sys.argv[1:])
