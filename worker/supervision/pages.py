"""/livez, /readyz and /metrics of a supervisor: one port for all its processes.

Reads the slots from another thread, which only looks. Knows what the pages say; HTTP is in `http_endpoints`.
"""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from embedq.producer.http_endpoints import Answer, Page
from embedq.worker.supervision.merging import EOF, merge_metrics
from embedq.worker.supervision.probe import Fetched, fetch
from embedq.worker.supervision.slots import SlotState
from embedq.worker.supervision.supervisor import Supervisor

#: Seconds without a look at the processes after which the supervisor counts as stuck.
STUCK_S = 30.0
#: Seconds for a child's metrics: less than Prometheus waits for all.
SCRAPE_TIMEOUT_S = 5.0
#: States of a slot as the metric tells them; what is done or stopped is none.
STATES = (SlotState.STARTING, SlotState.RUNNING, SlotState.BACKING_OFF, SlotState.GIVEN_UP)
REASONS = ("exit", "hung")
OPENMETRICS = "application/openmetrics-text"
_PLAIN = "text/plain; version=0.0.4; charset=utf-8"


class FleetPages:
    """Attributes: pages (for HttpEndpoints)."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._unanswered: Counter[int] = Counter()
        self._scraping = threading.Lock()
        self.pages: Mapping[str, Page] = {
            "/livez": Page(lambda _accept: self.livez()),
            "/readyz": Page(lambda _accept: self.readyz()),
            "/metrics": Page(self.metrics, is_slow=True),
        }

    def livez(self) -> Answer:
        stuck_s = self._supervisor.clock() - self._supervisor.ticked_at
        if stuck_s > STUCK_S:
            return _line(503, f"the supervisor has not looked after its processes for {stuck_s:.0f} s")
        if all(slot.state is SlotState.GIVEN_UP for slot in self._supervisor.slots):
            return _line(503, "all processes are given up")
        return _line(200, "ok")

    def readyz(self) -> Answer:
        """One ready process is enough; the body's further lines tell of each."""
        slots = self._supervisor.slots
        num_ready = sum([slot.is_ready for slot in slots])
        told = [f"process {slot.index} on {slot.place}: {slot.describe()}" for slot in slots]
        return _line(200 if num_ready else 503, "\n".join([f"{num_ready} of {len(slots)} processes ready", *told]))

    def metrics(self, accept: str) -> Answer:
        is_open = OPENMETRICS in accept
        with self._scraping:
            found = self._scrape(accept)
        pages = {index: fetched.body for index, fetched in found.items()}
        merged = merge_metrics(pages, self._own(is_open))
        content_type = next((fetched.content_type for fetched in found.values()), "")
        if not content_type:
            content_type = f"{OPENMETRICS}; version=1.0.0; charset=utf-8" if is_open else _PLAIN
        return Answer(200, (merged + (f"{EOF}\n" if is_open else "")).encode(), content_type)

    def _scrape(self, accept: str) -> dict[int, Fetched]:
        """Of the processes that answer, in the same format; the others are counted."""
        ports = {slot.index: slot.process.port for slot in self._supervisor.slots if slot.process is not None}
        if not ports:
            return {}
        with ThreadPoolExecutor(len(ports), thread_name_prefix="embedq-scrape") as pool:
            pages = dict(zip(ports, pool.map(lambda port: _fetch_metrics(port, accept), ports.values()), strict=True))
        self._unanswered.update(index for index, page in pages.items() if page is None)
        return {index: page for index, page in pages.items() if page is not None}

    def _own(self, is_open: bool) -> str:
        slots = self._supervisor.slots
        states = Counter(slot.state for slot in slots)
        restarts = {
            f'process="{slot.index}",reason="{reason}"': slot.restarts[reason] for slot in slots for reason in REASONS
        }
        unanswered = {f'process="{slot.index}"': self._unanswered[slot.index] for slot in slots}
        return "".join(
            [
                _family(
                    "embedq_supervisor_processes",
                    "gauge",
                    "Processes by state.",
                    {f'state="{state.value}"': states[state] for state in STATES},
                ),
                _counter("embedq_supervisor_restarts", "Processes started again.", restarts, is_open),
                _counter(
                    "embedq_supervisor_unanswered_scrapes", "Looks at a process's metrics without an answer.",
                    unanswered, is_open,
                ),
            ]
        )  # fmt: skip


def _fetch_metrics(port: int, accept: str) -> Fetched | None:
    try:
        fetched = fetch(port, "/metrics", SCRAPE_TIMEOUT_S, accept)
    except (OSError, http.client.HTTPException):
        return None
    return fetched if fetched.status == http.client.OK else None


def _counter(name: str, what: str, values: Mapping[str, int], is_open: bool) -> str:
    """OpenMetrics names the family without what its samples end in."""
    return _family(name if is_open else f"{name}_total", "counter", what, values, sample=f"{name}_total")


def _family(name: str, kind: str, what: str, values: Mapping[str, int], sample: str = "") -> str:
    lines = [f"{sample or name}{{{labels}}} {value}" for labels, value in values.items()]
    return "".join(f"{line}\n" for line in (f"# HELP {name} {what}", f"# TYPE {name} {kind}", *lines))


def _line(status: int, text: str) -> Answer:
    return Answer(status, f"{text}\n".encode())
