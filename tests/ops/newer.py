"""`python -m tests.ops.newer MODULE ARGUMENTS` runs a module as if it were of the next version: with the next version
of the wire format, which versions before it cannot read.
"""

from __future__ import annotations

import runpy
import sys

from embedq.producer import wire


def main() -> None:
    wire.VERSION += 1
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
