"""How results look on a terminal. Knows rich; asks nothing of Redis.

Imported when something is shown: rich and numpy take a tenth of a second that scripts need not wait for.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedq.producer.checks import printable
from embedq.producer.embeddings import Embeddings


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
