"""The client's half of the command line: enqueue, embed, status, result, group, cancel, requeue.

Knows click, rich and the public client API; needs neither torch nor a worker. `embedq.worker.cli` joins these
commands with its own under `embedq`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import orjson

from embedq.producer import formats
from embedq.producer.checks import printable
from embedq.producer.client import DEFAULT_QUEUE
from embedq.producer.connection import DEFAULT_URL
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import EmbedqError, JobNotFoundError, PartialEnqueueError
from embedq.producer.open_queue import open_queue
from embedq.producer.options import Precision, TruncationSide
from embedq.producer.password_file import with_password
from embedq.producer.queue import EmbedQueue
from embedq.producer.settings import FAILURE_TTL_S, RESULT_TTL_S, RETRIES
from embedq.producer.shards import split_urls

Command = TypeVar("Command", bound=Callable[..., Any])

url_option = click.option(
    "--url",
    default=DEFAULT_URL,
    show_default=True,
    callback=lambda _context, _option, urls: " ".join(map(with_password, split_urls(urls))),
    help="Redis: redis://, rediss:// (TLS), unix://, or redis+sentinel://HOST:PORT,.../SERVICE/DB. One with a password"
    " belongs into EMBEDQ_URL, not into a command line; or EMBEDQ_PASSWORD_FILE names a file that has the password."
    " For a queue on several servers all of them, with spaces between them; a worker serves one.",
)
queue_option = click.option("--queue", default=DEFAULT_QUEUE, show_default=True, help="Name of the queue.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def read_numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(number) for number in value.split(",") if number.strip())
    except ValueError as err:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers, as 10,60,300 is") from err


def timeout_option(default: float, meaning: str) -> Callable[[Command], Command]:
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0),
        default=default,
        show_default=True,
        help=meaning,
    )


def embed_options(command: Command) -> Command:
    """The options of `EmbedOptions`; those left out stay the model's own."""
    options = [
        click.option("--prompt", help="Text to put before each input."),
        click.option("--prompt-name", help="One of the model's own prompts, by name."),
        click.option("--normalize/--no-normalize", default=None, help="Unit length; default: as the model says."),
        click.option("--dimensions", type=int, help="Keep the first so many dimensions."),
        click.option(
            "--precision",
            type=click.Choice(get_args(Precision)),
            default="float32",
            show_default=True,
            help="Number type of the vectors.",
        ),
        click.option("--truncate/--no-truncate", default=True, show_default=True, help="Cut texts that are too long."),
        click.option(
            "--truncation-side",
            type=click.Choice(get_args(TruncationSide)),
            default="right",
            show_default=True,
            help="The side that is cut off.",
        ),
        click.option("--chunk", is_flag=True, help="Split texts that are too long into windows; take their mean."),
        click.option("--chunk-overlap", type=int, help="Tokens that windows share; default: an eighth of one."),
        click.option("--tokens", is_flag=True, help="One vector a token instead of one a text."),
        click.option("--expect-model", help="Fail the job if the worker serves another model."),
    ]
    for option in reversed(options):
        command = option(command)

    @wraps(command)
    def renamed(*args: Any, expect_model: str | None, tokens: bool, **kwargs: Any) -> Any:
        # --output names a file, so the option of that name goes by another.
        return command(*args, model=expect_model, output="tokens" if tokens else "sentence", **kwargs)

    return renamed  # type: ignore[return-value]


def output_options(command: Command) -> Command:
    """--format and --output, for vectors."""
    command = click.option(
        "--output",
        "-o",
        "output_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File to write; default: stdout.",
    )(command)
    return click.option(
        "--format",
        "file_format",
        type=click.Choice(["summary", *formats.FILE_FORMATS]),
        default="summary",
        show_default=True,
        help="summary is for people; the others hold all numbers.",
    )(command)


@click.command()
@click.argument("texts", nargs=-1)
@click.option("--file", "-f", type=click.File(encoding="utf-8"), help="One text a line; - is stdin.")
@click.option("--job-id", help="The job's id, for a single text. The same text under the same id is one job.")
@click.option("--one-job", is_flag=True, help="All texts in one job instead of one job each.")
@click.option("--result-ttl", type=int, default=RESULT_TTL_S, show_default=True, help="Seconds to keep the result.")
@click.option("--failure-ttl", type=int, default=FAILURE_TTL_S, show_default=True, help="Seconds to keep a failure.")
@click.option("--ttl", type=int, help="Seconds after which a job still waiting vanishes.")
@click.option("--retries", type=int, default=RETRIES, show_default=True, help="Attempts after the first.")
@click.option("--retry-intervals", default="", callback=read_numbers, help="Seconds before each retry: 10,60,300.")
@click.option("--at-front", is_flag=True, help="At the head of the queue.")
@click.option("--dedupe", is_flag=True, help="The same text with the same options is the same job until it expires.")
@click.option("--group", help="Name under which the jobs are counted and canceled together; see embedq group.")
@click.option("--depends-on", multiple=True, metavar="JOB_ID", help="Wait until this job has finished; repeatable.")
@click.option("--delay-s", type=click.FloatRange(min=0), default=0, help="Seconds until the jobs may start.")
@click.option("--max-depth", type=click.IntRange(min=1), help="Refuse jobs beyond so many on the queue.")
@click.option("--block-timeout", type=click.FloatRange(min=0), default=0, help="Seconds to wait for room instead.")
@embed_options
@queue_option
@url_option
@json_option
def enqueue(
    texts: tuple[str, ...],
    file: Any,
    job_id: str | None,
    one_job: bool,
    delay_s: float,
    queue: str,
    url: str,
    as_json: bool,
    **keywords: Any,
) -> None:
    """Put TEXTS on the queue and print the job ids, one a line.

    Without TEXTS and --file the texts come from stdin, one a line.

    \b
    embedq enqueue "Where do otters sleep?"
    embedq enqueue --file sentences.txt --dimensions 256
    """
    everything = read_texts(texts, file)
    if job_id is not None and len(everything) != 1 and not one_job:
        raise click.UsageError("--job-id names one job: give one text, or --one-job")
    with open_queue(url, queue) as client:
        if one_job or job_id is not None:
            jobs = [client.enqueue_in(delay_s, everything, job_id=job_id, **keywords)]
        else:
            try:
                jobs = client.enqueue_many(everything, delay=delay_s, **keywords)
            except PartialEnqueueError as err:
                _print_ids(err.job_ids, as_json)
                raise
    _print_ids([job.id for job in jobs], as_json)


@click.command()
@click.argument("texts", nargs=-1)
@click.option("--file", "-f", type=click.File(encoding="utf-8"), help="One text a line; - is stdin.")
@click.option(
    "--cache-ttl", type=int, help="Seconds to keep each text's vectors for the next time; with --expect-model."
)
@embed_options
@output_options
@timeout_option(60, "Seconds to wait; what is not done by then is canceled.")
@queue_option
@url_option
def embed(
    texts: tuple[str, ...],
    file: Any,
    file_format: str,
    output_file: Path | None,
    timeout: float,
    queue: str,
    url: str,
    **keywords: Any,
) -> None:
    """Embed TEXTS and wait for the vectors.

    \b
    embedq embed "Where do otters sleep?"
    embedq embed --file sentences.txt --format npy --output vectors.npy
    """
    check_output(file_format, output_file)
    if keywords["output"] == "tokens" and file_format == "npy":
        raise click.UsageError("npy cannot say which token is of which text; choose safetensors, json or jsonl")
    with open_queue(url, queue) as client:
        result = client.embed(read_texts(texts, file), timeout=timeout, **keywords)
    write_result(result, file_format, output_file)


@click.command()
@click.argument("job_ids", nargs=-1, required=True)
@url_option
@json_option
def status(job_ids: tuple[str, ...], url: str, as_json: bool) -> None:
    """Show where each job stands: queued, started, finished, failed, canceled.

    Exits with 3 if one of them does not exist or has expired.
    """
    with open_queue(url) as client:
        found = client.statuses(job_ids)
    for job_id, job_status in found.items():
        if as_json:
            echo_json({"id": job_id, "status": job_status})
        else:
            click.echo(f"{job_id}  {job_status or 'not found'}")
    missing = [job_id for job_id, job_status in found.items() if job_status is None]
    if missing:
        raise JobNotFoundError(f"{len(missing)} of {len(found)} jobs do not exist or have expired: {missing[0]} ...")


@click.command()
@click.argument("job_id")
@output_options
@timeout_option(30, "Seconds to wait for the result; 0 only looks.")
@url_option
def result(job_id: str, file_format: str, output_file: Path | None, timeout: float, url: str) -> None:
    """Fetch the embeddings of one job, waiting for it if need be.

    \b
    embedq result JOB_ID --format npy --output vectors.npy
    """
    check_output(file_format, output_file)
    with open_queue(url) as client:
        embeddings = client.result(job_id, timeout=timeout)
    write_result(embeddings, file_format, output_file)


@click.command()
@click.argument("name")
@click.option("--cancel", "is_canceled", is_flag=True, help="Cancel the jobs that have not ended yet.")
@url_option
@json_option
def group(name: str, is_canceled: bool, url: str, as_json: bool) -> None:
    """Show how many jobs of a group have which status.

    \b
    embedq enqueue --file sentences.txt --group nightly
    embedq group nightly
    """
    with open_queue(url) as client:
        jobs = client.group(name)
        if is_canceled:
            click.echo(f"{jobs.cancel():,} jobs canceled", err=True)
        counts = {str(status): number for status, number in sorted(jobs.counts().items())}
    if as_json:
        echo_json(counts)
    else:
        for status, number in counts.items():
            click.echo(f"{status}  {number:,}")
    if not counts:
        raise JobNotFoundError(f"group {name!r} has no jobs: none were enqueued under the name, or they have expired")


@click.command()
@click.argument("job_ids", nargs=-1, required=True)
@url_option
@json_option
def cancel(job_ids: tuple[str, ...], url: str, as_json: bool) -> None:
    """Cancel jobs that have not ended yet. What a worker still makes of them is dropped."""

    def cancel_one(client: EmbedQueue, job_id: str) -> str:
        return "canceled" if client.cancel(job_id) else f"had ended before: {client.status(job_id)}"

    _for_each(job_ids, url, cancel_one, as_json)


@click.command()
@click.argument("job_ids", nargs=-1, required=True)
@click.option("--at-front", is_flag=True, help="At the head of the queue.")
@url_option
@json_option
def requeue(job_ids: tuple[str, ...], at_front: bool, url: str, as_json: bool) -> None:
    """Put failed or canceled jobs back on their queue, their retries restored."""

    def requeue_one(client: EmbedQueue, job_id: str) -> str:
        client.requeue(job_id, at_front=at_front)
        return "queued"

    _for_each(job_ids, url, requeue_one, as_json)


#: What `embedq` offers a client.
COMMANDS = (enqueue, embed, status, result, group, cancel, requeue)


def read_texts(texts: tuple[str, ...], file: Any) -> list[str]:
    """From the arguments, else from --file, else from stdin; blank lines of a file are left out."""
    if texts and file is not None:
        raise click.UsageError("give texts or --file, not both")
    if texts:
        return list(texts)
    if file is None:
        if sys.stdin.isatty():
            raise click.UsageError("there is nothing to embed: give texts, --file, or pipe lines in")
        file = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8")
    try:
        lines = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as err:
        raise click.UsageError(f"the input is not UTF-8: {err.reason} at byte {err.start}") from err
    if not (found := [line for line in lines if line.strip()]):
        raise click.UsageError("there is nothing to embed: the input has no text")
    return found


def echo_json(value: Any) -> None:
    click.echo(orjson.dumps(value))


def check_output(file_format: str, output: Path | None) -> None:
    """Before anything is enqueued. Raises click's UsageError for a place that cannot take the vectors."""
    if output is None:
        if file_format in formats.BINARY_FORMATS and sys.stdout.isatty():
            raise click.UsageError(f"{file_format} is not for a terminal; add --output FILE")
    elif file_format == "summary":
        raise click.UsageError(f"--output needs --format {', '.join(formats.FILE_FORMATS)}")
    elif not output.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {output.parent} to write {output.name} into")


def write_result(result: Embeddings, file_format: str, output: Path | None) -> None:
    if file_format == "summary":
        from embedq.producer import tables

        tables.print_summary(result)
        return
    data = formats.encode(result, file_format)
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        formats.write_whole(output, data)
    except OSError as err:
        raise EmbedqError(f"{output} cannot be written ({err.strerror}); it was left as it was") from err
    rows, columns = result.vectors.shape
    click.echo(f"{output}: {rows} x {columns} {result.vectors.dtype}, {len(data):,} bytes", err=True)


def _print_ids(job_ids: list[str], as_json: bool) -> None:
    for job_id in job_ids:
        echo_json({"id": job_id}) if as_json else click.echo(job_id)


def _for_each(job_ids: tuple[str, ...], url: str, action: Callable[[EmbedQueue, str], str], as_json: bool) -> None:
    """Every job is tried; the first error ends the command after the last."""
    first_error: EmbedqError | None = None
    with open_queue(url) as client:
        for job_id in job_ids:
            try:
                outcome = action(client, job_id)
            except EmbedqError as err:
                if len(job_ids) == 1:
                    raise
                click.echo(f"{job_id}  {printable(str(err))}", err=True)
                first_error = first_error or err
            else:
                echo_json({"id": job_id, "outcome": outcome}) if as_json else click.echo(f"{job_id}  {outcome}")
    if first_error is not None:
        raise first_error
