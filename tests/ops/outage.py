"""Exercise: Redis goes away under load and comes back with what it had written, once in order, once killed."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.ops.audit import Account
from tests.ops.finding import Finding
from tests.ops.load import Load
from tests.ops.rolling import FLEET
from tests.ops.world import World, pause, tell_jobs

#: Seconds until the fleet does jobs again after Redis is back: workers and clients try again at growing distances.
MAX_RECOVERY_S = 15.0


def redis_restart(world: World, per_s: float, away_s: float) -> list[Finding]:
    finding = Finding(
        "Redis is restarted",
        [
            f"{FLEET} worker processes, {per_s:g} jobs/s. Redis is stopped (SIGTERM), is away for {away_s:g} s and"
            " reads its append-only file; the same once more with SIGKILL.",
        ],
    )
    places = world.fleet(FLEET)
    outages: list[tuple[str, float, float]] = []
    with world.load("outage", per_s) as load:
        for name, end in (("stopped", world.redis.stop), ("killed", world.redis.kill)):
            outages.append((name, *_outage(world, load, end, away_s)))
    account = world.settle(load.ids())
    for name, gone_at, back_at in outages:
        recovered_s = _first_after(account, back_at) - back_at
        finding.tell(f"{name}: seconds without Redis", f"{back_at - gone_at:.2f}")
        finding.check_at_most(f"{name}: the first job finished after Redis was back", recovered_s, MAX_RECOVERY_S)
    ended = [place.name for place in places if not place.is_running or not place.is_ready()]
    finding.check_none("workers that ended or are not ready", ended)
    tell_jobs(finding, account)
    return [finding]


def _outage(world: World, load: Load, end: Callable[[], None], away_s: float) -> tuple[float, float]:
    """When it began and when it was over."""
    world.await_flow(load)
    gone_at = time.time()
    end()
    pause(away_s)
    world.redis.start()
    back_at = time.time()
    world.await_flow(load)
    return gone_at, back_at


def _first_after(account: Account, moment: float) -> float:
    return min(each for each in account.finished_at if each > moment)
