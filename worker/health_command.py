"""`embedq health`: asks a worker on this machine how it is, for the probes of containers.

Knows HTTP and nothing else of embedq's, so that it starts in a fraction of the time that the other commands take;
`entry` goes there directly.
"""

from __future__ import annotations

import http.client

import click

#: What a server listens on to be reached by every address, and what reaches it from here.
_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # nosec B104 - no server of ours: it is what the worker was told
#: Bytes of an answer that are read.
MAX_ANSWER_BYTES = 4096


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--ready", is_flag=True, envvar="EMBEDQ_READY", help="Whether it can take jobs, rather than whether it lives."
)
@click.option(
    "--host",
    envvar="EMBEDQ_METRICS_HOST",
    default="127.0.0.1",
    show_default=True,
    help="Where it serves: its --metrics-host.",
)
@click.option(
    "--port",
    envvar="EMBEDQ_METRICS_PORT",
    type=click.IntRange(1, 65_535),
    required=True,
    help="Its --metrics-port.",
)
@click.option(
    "--timeout",
    envvar="EMBEDQ_TIMEOUT",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the answer.",
)
def health(ready: bool, host: str, port: int, timeout: float) -> None:
    """Ask a worker's /livez, or /readyz; print its answer and exit with 0 if it is well, else with 1.

    \b
    embedq health --port 9465
    embedq health --ready            with EMBEDQ_METRICS_PORT set, as for the worker
    """
    is_well, answer = ask(host, port, "/readyz" if ready else "/livez", timeout)
    click.echo(answer)
    raise click.exceptions.Exit(0 if is_well else 1)


def ask(host: str, port: int, path: str, timeout_s: float) -> tuple[bool, str]:
    """Whether it is well, and its answer in one line; what hindered it where there is none."""
    connection = http.client.HTTPConnection(_HERE.get(host, host), port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(MAX_ANSWER_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException, UnicodeError) as err:
        return False, f"no answer from {host} port {port}: {' '.join(str(err).split()) or type(err).__name__}"
    finally:
        connection.close()
    return answer.status == http.client.OK, " ".join(text.split()) or f"status {answer.status}"
