"""How queues, workers and failed jobs look on a terminal, narrow or wide. Knows rich; asks nothing of Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedq.producer import quantities
from embedq.producer.checks import printable
from embedq.producer.failed import FailedJob
from embedq.producer.fleet import FleetInfo, QueueInfo, WorkerInfo
from embedq.producer.rates import QueueRates

#: Characters of a terminal from which on more columns are shown.
NARROW, WIDE, WIDEST = 75, 110, 150
#: Of what is no terminal: nothing is left out there.
ENDLESS = 1000
#: What is left of a name at least.
LEAST_NAME = 8
_STATE_STYLES = {"busy": "green", "idle": "", "suspended": "yellow", "lost": "bold red", "started": "cyan"}


class _Column(NamedTuple):
    title: str
    cell: Callable[[Any], str | Text]
    #: numbers stand to the right; where there is too little room names give way
    kind: Literal["number", "word", "name"] = "number"
    #: characters of the terminal
    from_width: int = 0


def plain(found: str, style: str = "") -> Text:
    """What anybody may have written into Redis, neither as markup nor as commands to the terminal."""
    return Text(printable(found), style, overflow="ellipsis", no_wrap=True)


def queues_table(
    queues: Sequence[QueueInfo], width: int, rates: Mapping[str, QueueRates] | None = None, **style: Any
) -> Table:
    """`rates` adds jobs per second."""
    columns = [
        _Column("queue", lambda queue: plain(queue.name), "name"),
        _Column("queued", lambda queue: quantities.count(queue.queued)),
        _Column("texts", _texts),
        _Column("tokens", lambda queue: quantities.count(queue.tokens), from_width=WIDE),
        _Column("oldest", lambda queue: quantities.duration(queue.oldest_age_s)),
        _Column("backlog", _backlog),
    ]
    if rates is not None:
        columns += [
            _Column("in/s", lambda queue: _rate(rates.get(queue.name), "enqueued"), from_width=NARROW),
            _Column("out/s", lambda queue: _rate(rates.get(queue.name), "ended"), from_width=NARROW),
        ]
    columns += [
        _Column("started", lambda queue: quantities.count(queue.started), from_width=NARROW),
        _Column("scheduled", lambda queue: quantities.count(queue.scheduled), from_width=WIDE),
        _Column("deferred", lambda queue: quantities.count(queue.deferred), from_width=WIDE),
        _Column("parked", lambda queue: _alarming(queue.parked, "yellow"), from_width=WIDE),
        _Column(
            "finished", lambda queue: quantities.count(queue.finished), from_width=WIDE if rates is not None else 0
        ),
        _Column("failed", lambda queue: _alarming(queue.failed, "red")),
        _Column("canceled", lambda queue: quantities.count(queue.canceled), from_width=WIDE),
    ]
    return _table(columns, queues, width, style)


def workers_table(workers: Sequence[WorkerInfo], width: int, **style: Any) -> Table:
    columns = [
        _Column("worker", lambda worker: plain(worker.name), "name"),
        _Column("state", _state, "word"),
        _Column("queues", lambda worker: plain(", ".join(worker.queues)), "name", WIDE),
        _Column("model", lambda worker: plain(worker.model or "(stock rq)"), "name", WIDEST),
        _Column("device", lambda worker: plain(worker.device), "name"),
        _Column("dtype", lambda worker: plain(_told(worker, "dtype")), "name", WIDE),
        _Column("tokens/s", _speed),
        _Column("fill", lambda worker: _share(worker, "fill")),
        _Column("busy", lambda worker: _share(worker, "busy")),
        _Column("held", lambda worker: _told(worker, "held", quantities.count), from_width=NARROW),
        _Column("done", lambda worker: quantities.count(worker.jobs_done), from_width=NARROW),
        _Column("errors", _errors),
        _Column("version", lambda worker: plain(_told(worker, "version")), "name", WIDE),
        _Column("on", lambda worker: plain(f"{worker.host}:{worker.pid}"), "name", WIDEST),
    ]
    return _table(columns, workers, width, style)


def open_console() -> Console:
    """Into a pipe goes everything: there is no edge at which a line would end."""
    console = Console()
    return console if console.is_terminal else Console(width=ENDLESS)


def print_fleet(seen: FleetInfo) -> None:
    console = open_console()
    if seen.suspended:
        console.print("[yellow]suspended: no worker takes jobs until `rq resume`[/yellow]")
    if not seen.queues and not seen.workers:
        console.print("no queues and no workers here yet; `embedq worker` starts one")
        return
    console.print(queues_table(seen.queues, console.width))
    if any(queue.is_estimate for queue in seen.queues):
        console.print("~ is estimated from a sample")
    console.print(
        workers_table(seen.workers, console.width)
        if seen.workers
        else "no worker is running; `embedq worker` starts one"
    )


def print_failed(jobs: Sequence[FailedJob], *, has_more: bool) -> None:
    """Two lines a job."""
    console = open_console()
    for job in jobs:
        tries = "1 attempt" if job.attempts == 1 else f"{job.attempts} attempts"
        ago = "" if job.age_s is None else f", {quantities.duration(job.age_s)} ago"
        where = "" if job.text_index is None else f"text {job.text_index}: "
        console.print(
            Text.assemble(
                (printable(job.id), "bold"), f"  {printable(job.queue)}  ", (job.code, "red"), f"  {tries}{ago}"
            )
        )
        console.print(Text(f"    {where}{printable(job.message)}"))
    if not jobs:
        console.print("no failed jobs here")
    elif has_more:
        console.print(f"the first {len(jobs):,}; --limit shows more")


def print_details(told: Mapping[str, Any]) -> None:
    console = open_console()
    for name, value in told.items():
        console.print(Text.assemble((f"{name:<13} ", "bold"), "" if value is None else printable(str(value))))


def _table(columns: Sequence[_Column], rows: Sequence[Any], width: int, style: Mapping[str, Any]) -> Table:
    table = Table(**style)
    shown = [column for column in columns if width >= column.from_width]
    for column in shown:
        # Where there is too little room, names give way and numbers don't.
        table.add_column(
            column.title,
            justify="right" if column.kind == "number" else "left",
            no_wrap=column.kind != "name",
            min_width=min(LEAST_NAME, len(column.title)) if column.kind == "name" else None,
        )
    for row in rows:
        table.add_row(*(column.cell(row) for column in shown))
    return table


def _texts(queue: QueueInfo) -> str:
    return ("~" if queue.is_estimate else "") + quantities.count(queue.texts)


def _backlog(queue: QueueInfo) -> Text:
    return Text(quantities.duration(queue.backlog_s), "bold red" if queue.backlog_s == float("inf") else "")


def _rate(rates: QueueRates | None, name: str) -> str:
    return quantities.rate(None if rates is None else getattr(rates, name))


def _alarming(number: int, style: str) -> Text:
    return Text(quantities.count(number), style if number else "")


def _state(worker: WorkerInfo) -> Text:
    if worker.is_lost:
        return Text(f"lost {quantities.duration(worker.silent_s)}", _STATE_STYLES["lost"])
    return plain(worker.state, _STATE_STYLES.get(worker.state, ""))


def _told(worker: WorkerInfo, name: str, shown: Callable[[Any], str] = str) -> str:
    return "-" if worker.figures is None else shown(getattr(worker.figures, name))


def _share(worker: WorkerInfo, name: str) -> str:
    return _told(worker, name, quantities.share)


def _speed(worker: WorkerInfo) -> str:
    """Of late, pauses included."""
    return _told(worker, "recent_tokens_per_s", quantities.rate)


def _errors(worker: WorkerInfo) -> Text:
    number = worker.jobs_failed if worker.figures is None else worker.figures.errors
    return _alarming(number, "red")
