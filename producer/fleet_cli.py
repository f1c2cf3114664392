"""The operator's half of the command line: info, exporter.

Knows click; what is looked at is in `fleet`, how it looks in `tables`. Needs neither torch nor a worker.
"""

from __future__ import annotations

import click

from embedq.producer import fleet
from embedq.producer.cli import echo_json, json_option, url_option
from embedq.producer.connection import connect


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
        from embedq.producer import tables

        tables.print_fleet(seen)


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
COMMANDS = (info, exporter)
