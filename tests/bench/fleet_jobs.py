"""Jobs as a fleet has them: requests of texts of mixed length, and results of the size that they come to.

Both are made before anything is measured; many jobs share one result's bytes, whose numbers are by chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64

from embedq.model.samples import MIXED_SPREAD, sentences
from embedq.producer import EmbedQueue, calls, keys, requests, wire
from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.options import EmbedOptions, Precision
from embedq.producer.requests import Request
from embedq.producer.settings import JobSettings
from tests.bench.fleet_rates import SHORT

QUEUE = "embed"
DIMENSIONS = 768
DTYPES: dict[Precision, str] = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
#: Words of a text of 45 tokens, and requests that differ; the jobs are these by turns, under ids of their own.
MEAN_WORDS, DISTINCT_REQUESTS = 34, 32
#: Results read in one round trip.
READ_JOBS = 64


@dataclass(frozen=True, slots=True)
class Kind:
    """Jobs that are alike."""

    texts: int
    precision: Precision = "float32"

    @property
    def name(self) -> str:
        return f"{self.texts} x {self.precision}"

    @property
    def vector_bytes(self) -> int:
        return self.texts * DIMENSIONS * np.dtype(DTYPES[self.precision]).itemsize


def texts(number: int, seed: int = 7) -> list[str]:
    """Of English words, in no order that means anything: as compressible as text."""
    chance = random.Random(seed)
    words = [word for sentence in sentences() for word in sentence.split()]
    mu = math.log(MEAN_WORDS) - MIXED_SPREAD**2 / 2
    return [
        " ".join(chance.choices(words, k=max(1, round(chance.lognormvariate(mu, MIXED_SPREAD))))) for _ in range(number)
    ]


def jobs(kind: Kind, number: int, seed: int = 7) -> list[Request]:
    some = texts(kind.texts * min(number, DISTINCT_REQUESTS), seed)
    distinct = requests.spread(QUEUE, some, kind.texts, EmbedOptions(precision=kind.precision), JobSettings())
    ids = requests.fresh_ids(number)
    return [distinct[place % len(distinct)]._replace(job_id=job_id) for place, job_id in enumerate(ids)]


def enqueue(queue: EmbedQueue, some: Sequence[Request]) -> None:
    """As `embed_stream` does: in calls of bounded size."""
    settings = JobSettings()
    for chunk in requests.chunks(some, settings):
        queue._run(calls.enqueue(QUEUE, chunk, settings))


def result(kind: Kind) -> bytes:
    """What finish.lua is given of a job of this kind."""
    numbers = np.random.default_rng(7).standard_normal((kind.texts, DIMENSIONS)) * 30
    found = Embeddings(
        vectors=numbers.astype(DTYPES[kind.precision]),
        num_tokens=(SHORT.tokens,) * kind.texts,
        truncated=(False,) * kind.texts,
        model="all-mpnet-base-v2",
        revision="e8c3b32edf5434bc2275fc9bab85f82640a19130",
        worker="gpu-host-12.34567.0123456789ab",
        timings=Timings(queued_s=0.123456, tokenize_s=0.012345, encode_s=0.012345, total_s=0.234567, batch_texts=364),
        calibration="" if kind.precision != "int8" else "all-mpnet-base-v2",
    )
    return pybase64.b64encode(wire.encode_result(found))


def read_and_delete(client: Any, job_ids: Sequence[str]) -> int:
    """As `embed_stream` does with what it has read; the number of results. Nothing is decoded here."""
    num_read = 0
    for start in range(0, len(job_ids), READ_JOBS):
        some = job_ids[start : start + READ_JOBS]
        found = client.xread({keys.results(job_id): "0" for job_id in some}, count=1)
        num_read += len(found)
        with client.pipeline(transaction=False) as pipeline:
            pipeline.delete(*(key for job_id in some for key in (keys.job(job_id), keys.results(job_id))))
            pipeline.zrem(keys.finished(QUEUE), *some)
            pipeline.execute()
    return num_read
