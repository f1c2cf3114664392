"""The command `embedq`: the client's commands, the model's, and those that start processes: worker, up, demo.

Knows options, and how an error becomes one line and an exit status; the work is in the modules it calls.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import traceback
from pathlib import Path
from typing import Any, get_args

import click

from embedq.model import DeviceLostError, ModelDownloadError, ModelError, OutOfMemoryError
from embedq.model.bench_cli import bench_group
from embedq.model.cli import model_group
from embedq.producer import cli as client
from embedq.producer import fleet_cli
from embedq.producer.checks import printable
from embedq.producer.client import DEFAULT_QUEUE, check_queue_name
from embedq.producer.connection import connect, translated_errors
from embedq.producer.errors import (
    ConfigurationError,
    EmbedqError,
    InvalidRequestError,
    JobNotFoundError,
    PartialEnqueueError,
    QueueConnectionError,
    QueueServerError,
    ResultTimeoutError,
)
from embedq.worker.health_command import health
from embedq.worker.processes import follow_parent, retitle
from embedq.worker.settings import DequeueStrategyName, LogFormat, WorkerSettings, environment_variable
from embedq.worker.startup import leaving_at_once, until_served
from embedq.worker.statuses import (
    EXIT_DEVICE_LOST,
    EXIT_INTERRUPTED,
    EXIT_MODEL,
    EXIT_MODEL_LATER,
    EXIT_NO_JOB,
    EXIT_NO_RESULT,
    EXIT_OTHER,
    EXIT_REDIS,
    EXIT_USAGE,
    MEANINGS,
)
from embedq.worker.supervision.supervise import (
    ALL_CUDA,
    MAX_PROCESSES,
    RestartOrder,
    SupervisorSettings,
    supervise,
)
from embedq.worker.telemetry import logs

#: The first class that fits an error gives the exit status; any other error gives 1.
EXIT_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (InvalidRequestError, EXIT_USAGE),
    (ConfigurationError, EXIT_USAGE),
    (JobNotFoundError, EXIT_NO_JOB),
    (ResultTimeoutError, EXIT_NO_RESULT),
    (QueueConnectionError, EXIT_REDIS),
    (QueueServerError, EXIT_REDIS),
    (DeviceLostError, EXIT_DEVICE_LOST),
    (ModelDownloadError, EXIT_MODEL_LATER),
    (OutOfMemoryError, EXIT_MODEL_LATER),
    (ModelError, EXIT_MODEL),
)

_EPILOG = "\n".join(["\b", "Exit status:", *(f"  {status}  {meaning}" for status, meaning in MEANINGS.items())])


class ErrorLine(click.ClickException):
    """An error as click shows it: one line, and an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(printable(" ".join(message.split())))
        self._status = status

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return self._status

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


def _error_line(err: Exception) -> ErrorLine:
    # What stopped an enqueueing half-way says what kind of error it is.
    cause = err.__cause__ if isinstance(err, PartialEnqueueError) else err
    return ErrorLine(str(err), next((status for kind, status in EXIT_STATUSES if isinstance(cause, kind)), EXIT_OTHER))


def _usage_line(err: click.UsageError) -> click.ClickException:
    """`embedq model` alone is no mistake: click answers it with the help."""
    if isinstance(err, click.exceptions.NoArgsIsHelpError):
        return err
    command = err.ctx.command_path if err.ctx is not None else "embedq"
    return ErrorLine(f"{err.format_message().rstrip('.')}; see {command} --help", EXIT_USAGE)


class ErrorGroup(click.Group):
    """Turns errors into one line, or with --debug into a traceback as well."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as err:
            raise _usage_line(err) from err

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EmbedqError, ModelError) as err:
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise _error_line(err) from err
        except click.UsageError as err:
            raise _usage_line(err) from err
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


@click.group(cls=ErrorGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="embedq", message="embedq %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """Text embeddings over a Redis queue.

    Put texts on a queue, let workers drain it in micro-batches, fetch the vectors by job id. Each option has an
    environment variable: EMBEDQ_ and its name in capitals, such as EMBEDQ_URL.

    \b
    Try it:  embedq demo
    At home: embedq up            then  embedq embed "a text" --url URL
    A fleet: embedq worker --url redis://...
    """
    retitle(context.invoked_subcommand or "")
    logs.configure("text", logging.DEBUG if debug else logging.INFO)


class DottedName(click.types.StringParamType):
    """The name of a function; several of them are separated by commas in an environment variable."""

    name = "name"
    envvar_list_splitter = ","

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx).strip()


def _setting(name: str, **attributes: Any) -> Any:
    """An option with the setting's default and environment variable; a flag for each value of several is singular."""
    default = WorkerSettings.__dataclass_fields__[name].default
    flag = name.replace("_", "-")
    if attributes.get("multiple"):
        flag, default = flag.removesuffix("s"), None
        attributes["envvar"] = environment_variable(name)
    return click.option(
        f"--{flag}/--no-{flag}" if attributes.get("is_flag") else f"--{flag}",
        name,
        default=default,
        show_default=default is not None,
        **attributes,
    )


_ENCODER_SETTINGS = (
    _setting("model", help="Name, hub id or folder of the model; noop:768 is a stand-in without torch."),
    _setting("revision", help="Branch, tag or commit of a hub model."),
    _setting("device", help="auto, cpu, cuda, cuda:1 or mps; for several processes also cuda:all, each device's own."),
    _setting("dtype", help="auto, float32, bfloat16, float16 or int8."),
    _setting(
        "threads",
        type=int,
        help="Threads on the CPU; default: OMP_NUM_THREADS, else one a core, within the container's limit.",
    ),
    _setting("attention", help="auto, bmm, sdpa, or native on a CPU with AVX-512."),
    _setting("kernels", help="On a CPU: auto, native (this package's own, for AVX-512) or torch."),
    _setting("calibration", help="File of ranges for int8 and uint8 vectors; default: the model's own."),
    _setting(
        "max_batch_tokens",
        type=int,
        help="Tokens of one micro-batch; default: what the device is good for and its free memory allows.",
    ),
    _setting(
        "warm_up",
        is_flag=True,
        help="Encode the largest micro-batches first, and halve their tokens until they fit; default: on cuda.",
    ),
    _setting("allow_tf32", is_flag=True, help="Products of float32 on cuda with 10 bits of mantissa (TF32)."),
)
_QUEUE_SETTINGS = (
    _setting("lease_s", type=float, help="Seconds a claimed job is this worker's without a sign of life."),
    _setting("grace_s", type=float, help="Seconds from SIGTERM to the end."),
    _setting(
        "startup_timeout_s",
        type=float,
        help="Seconds to wait at the start for a Redis that cannot serve; 0: not at all; default: for good.",
    ),
    _setting("encode_timeout_s", type=float, help="Seconds that a micro-batch may take before the worker leaves."),
    _setting("max_claim_jobs", type=int, help="Jobs of one claim."),
    _setting(
        "allow_callbacks",
        type=DottedName(),
        multiple=True,
        help="Function that jobs may name as an RQ callback, such as app.hooks.done; may be given many times.",
    ),
    _setting("prefetch_batches", type=int, help="Micro-batches' worth of tokens that are claimed ahead."),
    _setting("linger_ms", type=float, help="Milliseconds that a micro-batch which is not full waits for more texts."),
    _setting(
        "max_latency_ms",
        type=float,
        help="Milliseconds from enqueueing to the end of encoding that micro-batches are cut for; default: full ones.",
    ),
    _setting("log_format", type=click.Choice(get_args(LogFormat)), help="Log lines for people or for programs."),
    _setting("metrics_port", type=int, help="Port of /livez, /readyz and /metrics; 0: a free one; default: none."),
    _setting("metrics_host", help="Address on which they are served; 0.0.0.0: every one."),
    # A socket that listens already: the supervisor's own way to its processes.
    _setting("metrics_fd", type=int, hidden=True, help="A socket of the supervisor's, instead of the port."),
    _setting(
        "liveness_timeout_s", type=float, help="Seconds without progress on jobs in hand after which /livez is red."
    ),
    _setting(
        "tracing",
        is_flag=True,
        help="Spans of traced jobs, sent by OTLP as the OTEL_ variables say; default: if they name an endpoint.",
    ),
)


def _settings_options(command: Any) -> Any:
    for option in reversed((*_ENCODER_SETTINGS, *_QUEUE_SETTINGS)):
        command = option(command)
    return command


def _supervisor_setting(name: str, **attributes: Any) -> Any:
    default = SupervisorSettings.__dataclass_fields__[name].default
    return click.option(f"--{name.replace('_', '-')}", name, default=default, show_default=True, **attributes)


_SUPERVISOR_SETTINGS = (
    click.option(
        "--processes",
        type=click.IntRange(1, MAX_PROCESSES),
        help="Run so many worker processes, with cuda:all on each device, under a supervisor that keeps them running.",
    ),
    _supervisor_setting(
        "hang_timeout_s",
        type=float,
        help="Seconds without an answer after which the supervisor replaces a process.",
    ),
    _supervisor_setting(
        "restart_order",
        type=click.Choice(get_args(RestartOrder)),
        help="Upon SIGHUP: the new process is ready before the old one ends, or the other way; auto: that on a GPU.",
    ),
)


def _supervisor_options(command: Any) -> Any:
    for option in reversed(_SUPERVISOR_SETTINGS):
        command = option(command)
    return command


@click.command()
@click.argument("queues", nargs=-1, envvar=environment_variable("queue"))
@client.url_option
@click.option(
    "--name", help="The worker's name; default: host, process and chance. Of several processes its beginning."
)
@click.option("--burst", is_flag=True, help="Stop once the queues are empty.")
@click.option("--max-jobs", type=click.IntRange(min=1), help="Stop after so many jobs; each of several processes.")
@click.option(
    "--dequeue-strategy",
    type=click.Choice(get_args(DequeueStrategyName)),
    default="default",
    show_default=True,
    help="The most urgent queue first, or each queue in turn, or at random.",
)
# The process that supervises this one.
@click.option("--child-of", type=int, hidden=True, help="With this process it ends.")
@_supervisor_options
@_settings_options
@click.pass_context
def worker(
    context: click.Context,
    /,
    queues: tuple[str, ...],
    url: str,
    name: str | None,
    burst: bool,
    max_jobs: int | None,
    dequeue_strategy: str,
    child_of: int | None,
    processes: int | None,
    hang_timeout_s: float,
    restart_order: RestartOrder,
    **settings: Any,
) -> None:
    """Drain QUEUES (default: embed), the most urgent first, until stopped.

    Waits for Redis if it is not there yet; wrong credentials and certificates end it at once. SIGTERM and Ctrl-C
    finish the micro-batch on the device and give the other claimed jobs back; a second signal leaves at once, and so
    does the first while the worker starts.

    Several processes have a supervisor: it starts again what ended or hangs, SIGHUP replaces them one after the other,
    and SIGTERM and Ctrl-C end them all.

    \b
    embedq worker --url redis://redis:6379/0 --device cuda
    embedq worker --url redis+sentinel://sentinel-1,sentinel-2,sentinel-3/mymaster/0
    embedq worker urgent bulk --burst
    embedq worker --device cuda:all --metrics-port 9463
    """
    with leaving_at_once():
        if child_of is not None:
            follow_parent(child_of)
        checked = WorkerSettings(**settings)
        is_debugging = bool(context.find_root().params.get("debug"))
        name = name or f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(2)}"
        logs.configure(checked.log_format, logging.DEBUG if is_debugging else logging.INFO, worker=name)
        names = [check_queue_name(queue) for queue in queues or [DEFAULT_QUEUE]]
        shown = printable(" ".join(names))
        if processes is None and checked.device != ALL_CUDA:
            retitle(f"worker {shown}")
            _work(names, url, checked, name, burst, max_jobs, dequeue_strategy)
            return
        retitle(f"worker supervisor {shown}")
        ending = supervise(
            context.meta[client.GIVEN_URL],
            names,
            checked,
            SupervisorSettings(processes=processes or 1, hang_timeout_s=hang_timeout_s, restart_order=restart_order),
            name=name,
            burst=burst,
            max_jobs=max_jobs,
            dequeue_strategy=dequeue_strategy,
            debug=is_debugging,
        )
        if ending.status:
            raise ErrorLine(ending.words, ending.status)


def _work(
    queues: list[str],
    url: str,
    settings: WorkerSettings,
    name: str,
    burst: bool,
    max_jobs: int | None,
    dequeue_strategy: str,
) -> None:
    """In this process."""
    from rq.worker import DequeueStrategy

    from embedq.worker.telemetry.monitor import Monitor
    from embedq.worker.worker import EmbedWorker

    connection = connect(url)

    def make() -> EmbedWorker:
        connection.ping()
        return EmbedWorker(queues, name=name, connection=connection, settings=settings, monitor=monitor)

    with translated_errors(connection), Monitor(settings, name, queues, connection) as monitor:
        # Before the model is loaded.
        made = until_served(connection, make, settings.startup_timeout_s)
        made.work(burst=burst, max_jobs=max_jobs, dequeue_strategy=DequeueStrategy(dequeue_strategy))


@click.command()
@click.option("--port", type=int, default=6390, show_default=True, help="Port of the Redis; 0: a free one.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of Redis' data, kept across restarts; default: the user's data folder.",
)
@client.queue_option
@_supervisor_options
@_settings_options
def up(
    port: int,
    data: Path | None,
    queue: str,
    processes: int | None,
    hang_timeout_s: float,
    restart_order: RestartOrder,
    **settings: Any,
) -> None:
    """Start a Redis and a worker on this machine; Ctrl-C stops both.

    What is queued or finished is still there at the next start. For one machine and for development; a fleet has
    a Redis of its own and runs `embedq worker`.
    """
    from embedq.worker.local import run_local_service

    supervised = SupervisorSettings(
        processes=processes or 1, hang_timeout_s=hang_timeout_s, restart_order=restart_order
    )
    run_local_service(port, data, queue, WorkerSettings(**settings), supervised)


@click.command()
@_settings_options
def demo(**settings: Any) -> None:
    """See it work: 400 sentences through a private Redis and a worker, and what the vectors are good for.

    Fetches the model first if it isn't here (418 MiB, once). Leaves nothing running.
    """
    from embedq.worker.demo import run_demo

    run_demo(WorkerSettings(**settings))


def _name_variables(command: click.Command) -> None:
    """Gives every option its environment variable, so that none is forgotten and none is named otherwise."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_eager and parameter.envvar is None:
            flag = max(parameter.opts, key=len).lstrip("-")
            parameter.envvar = environment_variable(flag.replace("-", "_"))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _name_variables(inner)


for _command in (demo, health, up, worker, *client.COMMANDS, *fleet_cli.COMMANDS, model_group, bench_group):
    main.add_command(_command)
_name_variables(main)

if __name__ == "__main__":
    main()
