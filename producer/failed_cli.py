"""`embedq failed`: list, show, requeue and purge failed jobs.

Knows click; what is found and done is in `failed`, how it looks in `fleet_tables`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click
import redis

from embedq.producer import failed
from embedq.producer.cli import Command, echo_json, json_option, url_option
from embedq.producer.client import check_queue_name
from embedq.producer.connection import connect
from embedq.producer.errors import EmbedqError
from embedq.producer.failed import FailedJob, Filter

#: Jobs that `list` shows unless it is told otherwise.
LIST_JOBS = 50
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw]?)", re.ASCII)


def read_duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Seconds, or a number with s, m, h, d or w behind it."""
    if value is None:
        return None
    if (match := _DURATION.fullmatch(value.strip())) is None:
        raise click.BadParameter(f"{value!r} is no duration, as 90, 15m, 2h or 7d are")
    return float(match[1]) * _UNITS[match[2]]


def _filter_options(command: Command) -> Command:
    options = (
        click.option("--queue", "queues", multiple=True, help="Of this queue alone; repeatable. Default: of all."),
        click.option("--code", "codes", multiple=True, help="With this error code alone; repeatable."),
        click.option("--older-than", callback=read_duration, help="That failed so long ago or more: 90, 15m, 2h, 7d."),
        click.option("--newer-than", callback=read_duration, help="That failed less long ago."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _limit_option(default: int | None) -> Callable[[Command], Command]:
    return click.option(
        "--limit",
        type=click.IntRange(min=1),
        default=default,
        show_default=default is not None,
        help="At most so many jobs, the latest first.",
    )


_yes_option = click.option("--yes", "-y", is_flag=True, help="Don't ask where several jobs are meant.")
_ids_argument = click.argument("job_ids", nargs=-1)


@click.group("failed")
def failed_group() -> None:
    """List, show, requeue and purge failed jobs.

    \b
    embedq failed list --code out_of_memory --newer-than 2h
    embedq failed requeue --code abandoned
    embedq failed purge --older-than 3d --yes
    """


@failed_group.command("list")
@_filter_options
@_limit_option(LIST_JOBS)
@url_option
@json_option
def list_jobs(limit: int, url: str, as_json: bool, **filters: Any) -> None:
    """List failed jobs, the latest of each queue first: why each failed, how often it was tried and when it ended.

    --json prints one object a line.
    """
    wanted = _filter(**filters)
    with connect(url) as client:
        found = failed.find(client, wanted)
        if as_json:
            for job in itertools.islice(found, limit):
                echo_json(job.to_plain())
            return
        jobs = list(itertools.islice(found, limit + 1))
    from embedq.producer import fleet_tables

    fleet_tables.print_failed(jobs[:limit], has_more=len(jobs) > limit)


@failed_group.command("show")
@click.argument("job_id")
@url_option
@json_option
def show_job(job_id: str, url: str, as_json: bool) -> None:
    """Show all that is known of one failed job, but not its texts."""
    with connect(url) as client:
        told = failed.details(client, job_id)
    if as_json:
        echo_json(told)
    else:
        from embedq.producer import fleet_tables

        fleet_tables.print_details(told)


@failed_group.command("requeue")
@_ids_argument
@_filter_options
@_limit_option(None)
@click.option("--at-front", is_flag=True, help="At the head of the queue.")
@_yes_option
@url_option
@json_option
def requeue_jobs(
    job_ids: tuple[str, ...], limit: int | None, at_front: bool, yes: bool, url: str, as_json: bool, **filters: Any
) -> None:
    """Put failed jobs back on their queues, their retries restored: JOB_IDS, or all that the options mean."""
    with connect(url) as client:
        jobs = _chosen(client, job_ids, limit, filters, "requeue", yes)
        requeued, left = failed.requeue(client, jobs, at_front=at_front)
    _tell("requeued", requeued, left, as_json)


@failed_group.command("purge")
@_ids_argument
@_filter_options
@_limit_option(None)
@_yes_option
@url_option
@json_option
def purge_jobs(job_ids: tuple[str, ...], limit: int | None, yes: bool, url: str, as_json: bool, **filters: Any) -> None:
    """Delete failed jobs for good: JOB_IDS, or all that the options mean.

    A job that was put back meanwhile is left alone.
    """
    with connect(url) as client:
        jobs = _chosen(client, job_ids, limit, filters, "delete", yes)
        purged, left = failed.purge(client, jobs)
    _tell("purged", purged, left, as_json)


def _filter(
    queues: tuple[str, ...], codes: tuple[str, ...], older_than: float | None, newer_than: float | None
) -> Filter:
    if older_than is not None and newer_than is not None and older_than >= newer_than:
        raise click.UsageError("--older-than and --newer-than leave nothing: the first must be the shorter")
    return Filter(
        queues=tuple(dict.fromkeys(check_queue_name(queue) for queue in queues)),
        codes=frozenset(codes),
        older_than_s=older_than,
        newer_than_s=newer_than,
    )


def _chosen(
    client: redis.Redis, job_ids: tuple[str, ...], limit: int | None, filters: dict[str, Any], verb: str, yes: bool
) -> Iterable[FailedJob]:
    """Those jobs, once somebody has agreed where they are several. Raises EmbedqError if nobody does."""
    wanted = _filter(**filters)
    if job_ids:
        if limit is not None or wanted != Filter():
            raise click.UsageError("give job ids or options that choose jobs, not both")
        return failed.fetch(client, dict.fromkeys(job_ids))

    def find() -> Iterator[FailedJob]:
        return itertools.islice(failed.find(client, wanted), limit)

    if not yes:
        number = sum(1 for _ in find())
        if number > 1:
            _agree(f"{verb} {number:,} failed jobs?")
    return find()


def _agree(question: str) -> None:
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort as err:
        raise EmbedqError(f"{question} Nobody answered, nothing was done; add --yes") from err
    if not agreed:
        raise EmbedqError("nothing was done")


def _tell(what: str, number: int, left: int, as_json: bool) -> None:
    if as_json:
        echo_json({what: number, "left": left})
        return
    why = "no longer as they were, or others wait for them"
    click.echo(f"{number:,} {what}" + (f", {left:,} left alone: {why}" if left else ""))
