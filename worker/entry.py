"""Where the command `embedq` begins: straight to the probe if that is asked for, else to all commands.

Importing them takes most of a second, a probe is run every few seconds.
"""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["health"]:
        from embedq.worker.health_command import health

        health(args=sys.argv[2:], prog_name="embedq health")
    else:
        from embedq.worker.cli import main as run

        run(prog_name="embedq")


if __name__ == "__main__":
    main()
