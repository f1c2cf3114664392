"""Whether this process belongs to a terminal that is still there. Knows no signals."""

from __future__ import annotations

import os


def has_terminal() -> bool:
    """A terminal that was closed is no longer to be had."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
