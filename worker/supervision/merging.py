"""The metrics of several processes as one page: each sample gets the label `process`, each family stands together.

Works on the text that Prometheus reads (both formats), line by line, so that numbers stay as they were written.
Knows no processes and no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: What ends a page of OpenMetrics.
EOF = "# EOF"
_HEADER = re.compile(r"# (HELP|TYPE|UNIT) (\S+)")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


class _Family:
    def __init__(self) -> None:
        #: by kind: the first process's line
        self.headers: dict[str, str] = {}
        self.samples: list[str] = []


def merge_metrics(pages: Mapping[int, str], own: str = "") -> str:
    """pages: by process. own: a page without that label, in the same format; its families are nobody else's.

    Lines that are no metrics are left out. The end mark of OpenMetrics is left to the caller.
    """
    families: dict[str, _Family] = {}
    for process, page in pages.items():
        _add(families, page, f'process="{process}"')
    _add(families, own, "")
    lines = [line for family in families.values() for line in (*family.headers.values(), *family.samples)]
    return "".join(f"{line}\n" for line in lines)


def _add(families: dict[str, _Family], page: str, label: str) -> None:
    family = _Family()
    # Not splitlines: a label's value may hold what Python counts as the end of a line.
    for line in page.split("\n"):
        if header := _HEADER.match(line):
            family = families.setdefault(header[2], _Family())
            family.headers.setdefault(header[1], line)
        elif labelled := _labelled(line, label):
            family.samples.append(labelled)


def _labelled(line: str, label: str) -> str:
    """Empty for a line that is no sample."""
    name = _NAME.match(line)
    if name is None or not label:
        return line if name else ""
    rest = line[name.end() :]
    if rest.startswith("{}"):
        return f"{name[0]}{{{label}}}{rest[2:]}"
    if rest.startswith("{"):
        return f"{name[0]}{{{label},{rest[1:]}"
    return f"{name[0]}{{{label}}}{rest}"
