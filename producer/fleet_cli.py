"""The operator's half of the command line: info, top, failed, exporter.

Knows click; what is looked at is in `fleet`, how it looks in `tables`. Needs neither torch nor a worker.
"""

from __future__ import annotations

import click

from embedq.producer import fleet
from embedq.producer.cli import echo_json, json_option, url_option
from embedq.producer.connection import connect
from embedq.producer.failed_cli import failed_group


@click.command()
@url_option
@json_option
def info(url: str, as_json: bool) -> None:
    """Show all queues and workers: what waits and for how long, who works and how fast."""
    with connect(url) as client:
        seen = fleet.look(client)
    if as_json:
        echo_json(seen.to_plain())
    else:
        from embedq.producer import fleet_tables

        fleet_tables.print_fleet(seen)


@click.command()
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print one picture and end.")
@url_option
def top(interval: float, once: bool, url: str) -> None:
    """Watch queues and workers until Ctrl-C: what waits, how fast it is worked off, what fails.

    The wider the terminal, the more columns. Into a pipe go pictures one below the other.
    """
    from embedq.producer.top import run_top

    run_top(url, interval, once=once)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on; 0.0.0.0: all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=9464, show_default=True, help="Port to serve on; 0: a free one."
)
@url_option
def exporter(host: str, port: int, url: str) -> None:
    """Serve the figures of all queues and workers to Prometheus; one for each Redis, however many workers there are.

    Looks at Redis when it is scraped. While Redis is away embedq_redis_up is 0; SIGTERM and Ctrl-C end it.

    \b
    embedq exporter --url redis://redis:6379/0 --host 0.0.0.0
    """
    from embedq.producer.exporter import run_exporter

    run_exporter(url, host, port)


#: What `embedq` offers an operator.
COMMANDS = (info, top, failed_group, exporter)
