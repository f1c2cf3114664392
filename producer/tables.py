"""How results and fleets look on a terminal. Knows rich; asks nothing of Redis.

Imported when something is shown: rich and numpy take a tenth of a second that scripts need not wait for.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from embedq.producer.checks import printable
from embedq.producer.embeddings import Embeddings
from embedq.producer.fleet import FleetInfo


def print_summary(result: Embeddings) -> None:
    # Of token output, the vector of each text's first token stands for the rest.
    firsts = [part[0] for part in result.tokens] if result.output == "tokens" else result.vectors
    table = Table("text", "tokens", "first numbers", "length")
    for index, (row, num_tokens, cut) in enumerate(zip(firsts, result.num_tokens, result.truncated, strict=True)):
        numbers = row.astype(np.float32)
        first = "  ".join(f"{number: .4f}" for number in numbers[:5])
        table.add_row(str(index), f"{num_tokens}{' (cut)' if cut else ''}", first, f"{np.linalg.norm(numbers):.4f}")
    console = Console()
    console.print(table)
    rows, columns = result.vectors.shape
    timings = result.timings
    console.print(
        f"{rows} x {columns} {result.vectors.dtype} by {escape(printable(result.model))}: "
        f"queued {timings.queued_s:.3f} s, encoded {timings.encode_s:.3f} s, in all {timings.total_s:.3f} s"
    )


def print_fleet(seen: FleetInfo) -> None:
    console = Console()
    if seen.suspended:
        console.print("[yellow]suspended: no worker takes jobs until `rq resume`[/yellow]")
    if not seen.queues and not seen.workers:
        console.print("no queues and no workers here yet; `embedq worker` starts one")
        return
    queues = Table("queue", "queued", "started", "finished", "failed", "canceled")
    for queue in seen.queues:
        counts = (queue.queued, queue.started, queue.finished, queue.failed, queue.canceled)
        queues.add_row(_plain(queue.name), *(f"{count:,}" for count in counts))
    console.print(queues)
    workers = Table("worker", "state", "queues", "model", "device", "done", "failed", "on")
    for worker in seen.workers:
        workers.add_row(
            *map(_plain, (worker.name, worker.state, ", ".join(worker.queues), worker.model or "(stock rq)")),
            *(_plain(worker.device), f"{worker.jobs_done:,}", f"{worker.jobs_failed:,}"),
            _plain(f"{worker.host}:{worker.pid}"),
        )
    console.print(workers if seen.workers else "no worker is running; `embedq worker` starts one")


def _plain(found: str) -> Text:
    """What anybody may have written into Redis, neither as markup nor as commands to the terminal."""
    return Text(printable(found))
