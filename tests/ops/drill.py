"""`python -m tests.ops.drill`: a fleet of real processes is restarted, killed, hung, cut off from Redis, upgraded and
watched, under load, and every job and every metric is checked from outside. Exit status 1 unless all is as it must be.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from tests.chaos.drill_report import tell
from tests.ops.finding import Finding
from tests.ops.outage import redis_restart
from tests.ops.releases import unpack
from tests.ops.report import markdown
from tests.ops.rolling import rolling_restart
from tests.ops.supervised import hanging_process, killed_process, signalled_restart
from tests.ops.upgrade import release_upgrade, wire_upgrade
from tests.ops.watched import metrics_move
from tests.ops.world import World

Exercise = Callable[[World], Sequence[Finding]]

#: Jobs a second of the load: less than half of what the fleet can do.
PER_S = 250.0
#: By name, in the order in which they are done.
EXERCISES: Mapping[str, Exercise] = {
    "rolling": functools.partial(rolling_restart, per_s=PER_S, calm_s=8.0),
    "hangup": functools.partial(signalled_restart, per_s=PER_S, calm_s=3.0),
    "kill": functools.partial(killed_process, per_s=PER_S),
    "hang": functools.partial(hanging_process, per_s=PER_S / 2),
    "outage": functools.partial(redis_restart, per_s=PER_S, away_s=3.0),
    "metrics": metrics_move,
    "upgrade": functools.partial(wire_upgrade, per_s=PER_S, calm_s=4.0),
}


def from_release(commit: str, folder: Path) -> Exercise:
    """The upgrade from what this repository was at that commit."""
    sources = unpack(commit, folder / f"sources-{commit}")
    return functools.partial(release_upgrade, per_s=PER_S, calm_s=6.0, older_sources=sources, release=commit)


def run(exercises: Mapping[str, Exercise], folder: Path, say: Callable[[str], None]) -> tuple[list[Finding], str]:
    """What the exercises found, and the version of Redis."""
    findings: list[Finding] = []
    redis_version = ""
    for name, exercise in exercises.items():
        say(f"{name} ...")
        began_at = time.monotonic()
        with World(folder / name, say) as world:
            redis_version = world.queue._redis.info("server")["redis_version"]
            found = exercise(world)
        findings += found
        bad = [row for finding in found for row in finding.bad]
        verdict = "; ".join(f"{row.what}: {row.found}" for row in bad) or "as it must be"
        say(f"{name}: {time.monotonic() - began_at:.0f} s, {verdict}")
    return findings, redis_version


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(EXERCISES)), help="May be given many times.")
@click.option("--release", help="Also the upgrade from this commit or tag, and back.")
@click.option("--report", "to", type=click.Path(path_type=Path, dir_okay=False), help="File for the tables.")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps all logs.")
def main(only: Sequence[str], release: str | None, to: Path | None, logs: Path | None) -> None:
    """The operations drill."""
    folder = logs or Path(tempfile.mkdtemp(prefix="ops-"))
    exercises = {name: EXERCISES[name] for name in only or EXERCISES}
    if release:
        exercises["release"] = from_release(release, folder)
    findings, redis_version = run(exercises, folder, lambda line: click.echo(line, err=True))
    tell(markdown(findings, redis_version), to)
    if any(finding.bad for finding in findings):
        click.echo(f"not as it must be; logs in {folder}", err=True)
        sys.exit(1)
    if logs is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
