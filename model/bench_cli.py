"""`embedq bench ...`: options and progress of the measurements, and where their results go.

A `ModelError` is left to whoever runs the group, as in `embedq model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedq.model.errors import ModelOptionError
from embedq.model.samples import CORPORA
from embedq.model.sources import resolve_model
from embedq.model.terminal import terminal_progress

if TYPE_CHECKING:
    from embedq.model.bench import EncoderBench

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
ATTENTIONS = ("auto", "bmm", "sdpa", "native")
EXIT_INTERRUPTED = 130


@click.group("bench")
def bench_group() -> None:
    """Measure on this machine."""


@bench_group.command("encoder", short_help="Speed, fidelity, latency and memory of the encoder on this device.")
@click.argument("name", envvar="EMBEDQ_MODEL", default="all-mpnet-base-v2")
@click.option(
    "--device", envvar="EMBEDQ_DEVICE", show_envvar=True, default="auto", help="auto, cpu, cuda, cuda:1 or mps."
)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Default: all that the device is good at."
)
@click.option(
    "--attention",
    "attentions",
    multiple=True,
    type=click.Choice(ATTENTIONS),
    help="Default: auto on a CPU, elsewhere bmm and sdpa.",
)
@click.option(
    "--corpus", "corpora", multiple=True, type=click.Choice(CORPORA), help="About 12, 45 and 300 tokens a text."
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of which medians are taken.")
@click.option("--num-texts", type=click.IntRange(min=1), help="Of each corpus. Default: what suits the device.")
@click.option(
    "--max-batch-tokens",
    multiple=True,
    type=click.IntRange(min=1),
    help="Sizes of micro-batches to compare. Default: what suits the device.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for programs.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write the tables, as Markdown, to this file too.",
)
def encoder(name: str, as_json: bool, output: Path | None, **settings: Any) -> None:
    """Measure the model NAME (default: all-mpnet-base-v2) on this device.

    For each number type and attention backend, on short, mixed and long texts: tokens and texts per second, cosines
    to float32, rank correlation with the grades of the sentence pairs that ship with embedq, seconds to load and of
    the first batch, peak memory, latency of a single query, and speed by size of micro-batch. All take turns in
    each round. --dtype, --attention, --corpus and --max-batch-tokens may be given several times. Ctrl-C ends with
    what was measured so far.

    \b
    Example, on a GPU host:
      embedq bench encoder --output t4.md
      embedq bench encoder --device cpu --dtype bfloat16 --dtype int8 --corpus mixed
    """
    from embedq.model.bench import BenchSettings, EncoderBench
    from embedq.model.bench_report import document, markdown

    if output is not None and not output.absolute().parent.is_dir():
        raise click.BadParameter(f"no folder {output.absolute().parent}", param_hint="--output")
    with terminal_progress() as fetching:
        resolved = resolve_model(name, progress=fetching)
    bench = EncoderBench(BenchSettings(model=str(resolved.path), **settings))
    interrupted = _run(bench)
    found = document(bench, resolved.name, interrupted=interrupted)
    shown = markdown(found)
    # Shown first: what took minutes is not lost to a full disk.
    click.echo(json.dumps(found, ensure_ascii=False, indent=2) if as_json else shown.rstrip())
    if output is not None:
        try:
            output.write_text(shown, encoding="utf-8")
        except OSError as err:
            raise ModelOptionError(f"{output} cannot be written ({err.strerror})") from err
    if interrupted:
        click.get_current_context().exit(EXIT_INTERRUPTED)


def _run(bench: EncoderBench) -> bool:
    """Whether it was interrupted; before anything was measured that is no result but the end."""
    try:
        with _progress_bar() as report:
            bench.run(report)
    except KeyboardInterrupt:
        if not bench.results:
            raise
        return True
    return False


@contextmanager
def _progress_bar() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(30), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda label, share: bar.update(task, description=label, completed=share)
