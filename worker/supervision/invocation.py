"""`embedq worker` as somebody starts it who has its settings: the command line and the environment of a child.

Knows how settings become flags; knows no processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from embedq.worker.settings import ENVIRONMENT_PREFIX, WorkerSettings, environment_variable

#: This Python's own `embedq`.
EMBEDQ = (sys.executable, "-m", "embedq.worker.cli")
#: Variables of ours that are no options.
INHERITED_VARIABLES = ("EMBEDQ_CACHE", "EMBEDQ_MODEL_SOURCE")


def worker_command(
    queues: Sequence[str], settings: WorkerSettings, arguments: Sequence[str] = (), program: Sequence[str] = EMBEDQ
) -> list[str]:
    """Without the URL, which may hold a password: it goes by the environment.

    arguments: options that are no settings, such as --name.
    """
    return [*program, "worker", *arguments, *settings_flags(settings), "--", *queues]


def settings_flags(settings: WorkerSettings) -> list[str]:
    flags: list[str] = []
    for setting in fields(settings):
        value, flag = getattr(settings, setting.name), setting.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            for item in value:
                flags += [f"--{flag.removesuffix('s')}", item]
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def worker_environment(url: str) -> dict[str, str]:
    """All settings go by flags: what is set for commands typed here (EMBEDQ_BURST, ...) is not meant for the child."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENVIRONMENT_PREFIX) or name in INHERITED_VARIABLES
    }
    return {**inherited, environment_variable("url"): url}
