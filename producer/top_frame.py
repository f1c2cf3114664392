"""One picture of a fleet that fits its terminal, for `embedq top`. Knows rich; asks nothing of Redis."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from embedq.producer import quantities
from embedq.producer.checks import printable
from embedq.producer.fleet import FleetInfo
from embedq.producer.fleet_tables import plain, queues_table, workers_table
from embedq.producer.rates import QueueRates

#: Lines below the head that are no rows: a blank before each table, its titles, and what is left out of it.
_OTHER_LINES = 6
_LEAST_ROWS = 3
_STYLE = {"box": None, "padding": (0, 2, 0, 0), "header_style": "bold", "expand": False}


@dataclass(frozen=True, slots=True)
class Frame:
    """What is known at a moment; rendered anew for each size of the terminal."""

    place: str
    #: None until the first look has succeeded
    seen: FleetInfo | None = None
    rates: Mapping[str, QueueRates] = field(default_factory=dict)
    #: of the failed jobs looked at, by error code; None if Redis' user may not look at them
    codes: Mapping[str, int] | None = None
    #: why the last look did not succeed
    error: str | None = None
    #: seconds since 1970 of the last look that did
    looked_at: float = 0.0
    #: without an end of the terminal: everything is shown
    is_endless: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = [self._title()]
        if self.error is not None:
            head.append(Text(f"no connection: {self.error}", "bold red", overflow="fold"))
        if self.seen is None:
            yield from head
            return
        head += self._summary(self.seen)
        yield from head
        room = 10**6
        if not self.is_endless:
            as_it_comes = options.update(height=None)
            taken = sum(len(console.render_lines(line, as_it_comes)) for line in head)
            room = max(2 * _LEAST_ROWS, (options.height or console.height) - taken - _OTHER_LINES)
        yield self._tables(self.seen, options.max_width, room)

    def _title(self) -> Text:
        moment = time.strftime("%H:%M:%S", time.localtime(self.looked_at)) if self.looked_at else ""
        return Text.assemble(
            ("embedq top", "bold"), "  ", plain(self.place), "  ", (moment, "dim"), overflow="ellipsis", no_wrap=True
        )

    def _summary(self, seen: FleetInfo) -> Iterator[Text]:
        if seen.suspended:
            yield Text("suspended: no worker takes jobs until `rq resume`", "yellow")
        states = Counter(worker.state for worker in seen.workers)
        workers = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        told = [worker.figures for worker in seen.workers if worker.figures is not None and not worker.is_lost]
        recent, capable = sum(each.recent_tokens_per_s for each in told), sum(each.tokens_per_s for each in told)
        line = Text(
            f"{len(seen.workers)} worker{'' if len(seen.workers) == 1 else 's'}", overflow="ellipsis", no_wrap=True
        )
        line.append(f" ({printable(workers)})" if workers else "")
        line.append(f"  {quantities.rate(recent)} tokens/s of {quantities.rate(capable)}")
        if seen.server is not None:
            line.append(f"  Redis {quantities.size(seen.server.used_memory_bytes)}")
            if most := seen.server.max_memory_bytes:
                is_tight = seen.server.used_memory_bytes > 0.9 * most
                line.append(f" of {quantities.size(most)}", "bold red" if is_tight else "")
        yield line
        yield self._failures(seen)

    def _failures(self, seen: FleetInfo) -> Text:
        number = sum(queue.failed for queue in seen.queues)
        line = Text(f"{quantities.count(number)} failed", "red" if number else "", overflow="ellipsis", no_wrap=True)
        if self.codes:
            codes = sorted(self.codes.items(), key=lambda item: (-item[1], item[0]))
            line.append(f", of the last {sum(self.codes.values())}: ")
            line.append(", ".join(f"{code} {times}" for code, times in codes))
        return line

    def _tables(self, seen: FleetInfo, width: int, room: int) -> Group:
        """Of `room` rows each table has what it needs, or half."""
        num_queues = min(len(seen.queues), max(room // 2, room - len(seen.workers)))
        num_workers = min(len(seen.workers), room - num_queues)
        # What waits longest, and whoever is lost, must not be among those left out.
        queues = sorted(seen.queues, key=lambda queue: (-queue.backlog_s, -queue.queued, queue.name))[:num_queues]
        workers = sorted(seen.workers, key=lambda worker: (not worker.is_lost, worker.name))[:num_workers]
        parts: list[Text | Table] = [
            Text(""),
            queues_table(queues, width, self.rates, **_STYLE) if queues else Text("no queue yet"),
        ]
        parts += _left_out(len(seen.queues) - num_queues, "queues")
        parts += [Text(""), workers_table(workers, width, **_STYLE) if workers else Text("no worker is running")]
        return Group(*parts, *_left_out(len(seen.workers) - num_workers, "workers"))


def _left_out(number: int, what: str) -> list[Text]:
    return [Text(f"... {number} more {what}", "dim")] if number else []
