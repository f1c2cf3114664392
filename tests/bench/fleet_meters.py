"""What a server says of itself before and after something was done to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Seconds in which Redis gives back the buffers of closed connections.
SETTLE_S = 0.3


@dataclass(frozen=True, slots=True)
class Meter:
    """Growth between two looks; the looks themselves take some 0.2 ms of the server."""

    seconds: float
    #: of the thread that runs commands
    cpu_s: float
    num_commands: int
    bytes_in: int
    bytes_out: int

    @property
    def cpu_share(self) -> float:
        return self.cpu_s / self.seconds


class Metered:
    """What is done while `metered` runs; `meter` is there afterwards."""

    meter: Meter


@contextmanager
def metered(client: Any) -> Iterator[Metered]:
    found = Metered()
    before = client.info("everything")
    yield found
    after = client.info("everything")

    def growth(*names: str) -> Any:
        return sum(after[name] - before[name] for name in names)

    found.meter = Meter(
        # The server's own clock: a busy one takes its time to answer.
        seconds=growth("server_time_usec") / 1e6,
        cpu_s=growth("used_cpu_user_main_thread", "used_cpu_sys_main_thread"),
        num_commands=growth("total_commands_processed"),
        bytes_in=growth("total_net_input_bytes"),
        bytes_out=growth("total_net_output_bytes"),
    )


def used_bytes(client: Any) -> int:
    """Without what connections and the append-only file's buffer take at the moment."""
    time.sleep(SETTLE_S)
    told = client.info("memory")
    return int(told["used_memory"] - told["mem_clients_normal"] - told["mem_aof_buffer"])
