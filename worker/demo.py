"""`embedq demo`: the whole way of a text, from the client API to nearest neighbours, on a private Redis.

Everything goes through the public client and the same worker command that a fleet runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from embedq.model import samples
from embedq.producer import Embeddings, EmbedJob, EmbedqError, EmbedQueue, JobStatus
from embedq.worker.local import WorkerProcess, local_service, sigterm_as_interrupt, with_model_fetched
from embedq.worker.redis_server import RedisServer
from embedq.worker.settings import WorkerSettings

QUEUE = "embed"
#: Seconds for all sentences on a slow machine.
TIMEOUT_S = 170.0
POLL_EVERY_S = 0.25
NEIGHBOURS = 3


def run_demo(settings: WorkerSettings) -> None:
    """Prints to stdout. Raises EmbedqError or ModelError; nothing is left running whichever way it ends."""
    console = Console(highlight=False)
    sentences, queries = samples.sentences(), _lines("queries.txt")
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="embedq-") as folder:
        settings = with_model_fetched(settings)
        console.print("Starting a private Redis and a worker ...")
        with (
            local_service(RedisServer(Path(folder)), QUEUE, settings) as worker,
            EmbedQueue(worker.url, queue=QUEUE) as queue,
        ):
            began_at = time.monotonic()
            jobs = _embed_all(queue, worker, sentences, console)
            took_s = time.monotonic() - began_at
            results = queue.results([job.id for job in jobs], timeout=0)
            embedded = [results[job.id] for job in jobs]
            if failure := next((outcome for outcome in embedded if isinstance(outcome, EmbedqError)), None):
                raise failure
            found = [outcome for outcome in embedded if isinstance(outcome, Embeddings)]
            answers = queue.embed(queries, timeout=TIMEOUT_S)
            _print_neighbours(console, queries, answers, sentences, found)
            _print_job(console, queue, jobs[0], sentences[0])
            _print_speed(console, found, took_s)
    _print_next_steps(console)


def _embed_all(queue: EmbedQueue, worker: WorkerProcess, sentences: Sequence[str], console: Console) -> list[EmbedJob]:
    columns = (TextColumn("{task.description:<9}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        enqueued = progress.add_task("enqueued", total=len(sentences))
        finished = progress.add_task("embedded", total=len(sentences))
        jobs = queue.enqueue_many(sentences)
        progress.update(enqueued, completed=len(jobs))
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            statuses = queue.statuses(job.id for job in jobs).values()
            ended = sum(status is None or status.is_terminal for status in statuses)
            progress.update(finished, completed=ended)
            if ended == len(jobs) or time.monotonic() > deadline:
                return jobs
            worker.check()
            time.sleep(POLL_EVERY_S)


def _print_neighbours(
    console: Console, queries: Sequence[str], answers: Embeddings, sentences: Sequence[str], found: Sequence[Embeddings]
) -> None:
    """Unit vectors: the dot product is the cosine."""
    corpus = np.concatenate([result.vectors for result in found]).astype(np.float32)  # (sentences, d)
    cosines: NDArray[np.float32] = answers.vectors.astype(np.float32) @ corpus.T  # (queries, sentences)
    title = "What the vectors are good for"
    if found[0].model.startswith("noop:"):
        title = f"{found[0].model} knows no language: its neighbours are chance"
    table = Table("cosine", "nearest sentences", title=title, title_justify="left")
    for query, row in zip(queries, cosines, strict=True):
        table.add_row("", f"[bold]{query}[/bold]")
        for place in np.argsort(-row)[:NEIGHBOURS]:
            table.add_row(f"{row[place]:.3f}", sentences[place])
        table.add_section()
    console.print(table)


def _print_job(console: Console, queue: EmbedQueue, job: EmbedJob, sentence: str) -> None:
    status: JobStatus = job.status()
    result = queue.result(job.id, timeout=0)
    timings = result.timings
    console.print(
        f"\nOne job by its id: [bold]{job.id}[/bold] is [green]{status}[/green]\n"
        f'  "{sentence}"\n'
        f"  {result.num_tokens[0]} tokens -> {result.vectors.shape[1]} numbers by {result.model}\n"
        f"  waited {timings.queued_s:.2f} s, encoded in {timings.encode_s:.2f} s with {timings.batch_texts - 1} others"
    )


def _print_speed(console: Console, found: Sequence[Embeddings], took_s: float) -> None:
    num_tokens = sum(sum(result.num_tokens) for result in found)
    console.print(
        f"\n{len(found)} texts, {num_tokens:,} tokens in {took_s:.1f} s: "
        f"[bold]{len(found) / took_s:.0f} texts/s[/bold], {num_tokens / took_s:,.0f} tokens/s with one worker"
    )


def _print_next_steps(console: Console) -> None:
    console.print(
        "\nNext:\n"
        "  embedq up                      a Redis and a worker that stay; prints a URL\n"
        "  export EMBEDQ_URL=that URL\n"
        '  embedq embed "any text"        one text, now\n'
        "  embedq enqueue --file FILE     a job a line; prints the ids\n"
        "  embedq status ID, result ID    follow a job, fetch its vector\n"
        "  embedq --help                  all commands"
    )


def _lines(name: str) -> list[str]:
    text = files(__package__ or "embedq.worker").joinpath(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]
