"""`python -m tests.fuzz --bytes 10000000 --seed 1`: the long way, within a limit of memory."""

from __future__ import annotations

import resource
import time

import click

from tests import fuzz

#: Bytes of address space beyond those in use at the start: the largest request takes a fraction of it.
ROOM_BYTES = 1024 * 1024 * 1024


def limit_memory() -> None:
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115, PTH123
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


@click.command()
@click.option("--bytes", "num_bytes", type=int, default=10_000_000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
def main(num_bytes: int, seed: int) -> None:
    limit_memory()
    began_at = time.monotonic()
    found = fuzz.run(num_bytes, seed)
    for name, figures in found.items():
        click.echo(f"{name:16}  {figures.inputs:>8,} inputs  {figures.bytes:>11,} bytes  {figures.read:>7,} read")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    total = sum(figures.bytes for figures in found.values())
    click.echo(f"seed {seed}: {total:,} bytes in {time.monotonic() - began_at:.0f} s, at most {peak} MiB of memory")


if __name__ == "__main__":
    main()
