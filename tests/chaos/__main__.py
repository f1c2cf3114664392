"""`python -m tests.chaos --seconds 1800 --seed 7`: kills, stops and cuts at random while jobs run.

Checks every job from outside. Prints a line every ten seconds, at the end the table, and each violation with what is
known of its job. Exit status 1 if there is any; the folder with all logs then stays.
"""

from __future__ import annotations

import functools
import random
import shutil
import sys
import tempfile
from pathlib import Path

import click

from tests.chaos.history import history
from tests.chaos.plan import plan
from tests.chaos.report import machine, markdown, rows
from tests.chaos.run import Run

#: Violations that are told in full.
MAX_TOLD = 50

tell = functools.partial(print, flush=True)


@click.command()
@click.option("--seconds", type=click.FloatRange(min=10), default=180, show_default=True, help="With faults.")
@click.option("--seed", type=int, help="Of all that is drawn; default: by chance.")
@click.option("--jobs-per-s", type=click.FloatRange(min=1), default=80, show_default=True)
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="File for the table.")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps all logs.")
def main(seconds: float, seed: int | None, jobs_per_s: float, report: Path | None, logs: Path | None) -> None:
    """Faults at random, and every job checked."""
    seed = random.randrange(1_000_000) if seed is None else seed
    folder = logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    tell(f"seed {seed}, {seconds:g} s, logs in {folder}")
    findings = Run(plan(seed, seconds, jobs_per_s), folder, tell).findings()
    for name, value in rows(findings):
        tell(f"{name.replace('*', ''):75} {value.replace('*', '')}")
    tell("\n".join(machine(findings)))
    if report is not None:
        report.write_text(markdown(findings))
    for violation in findings.violations[:MAX_TOLD]:
        tell(f"\n{violation}\n{history(violation, findings.ledger, folder)}")
    if findings.violations:
        listing = folder / "violations.txt"
        listing.write_text("".join(f"{violation}\n" for violation in findings.violations))
        tell(f"\n{len(findings.violations)} violations, all in {listing}; again: --seed {seed} --seconds {seconds:g}")
        sys.exit(1)
    if logs is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
