"""Exercise: every worker of a fleet is restarted under load, one after the other, as a deploy does."""

from __future__ import annotations

from tests.ops.finding import Finding
from tests.ops.world import World, pause, tell_jobs, tell_restart

FLEET = 3
#: Seconds without any finished job that nobody may see.
MAX_GAP_S = 2.0


def rolling_restart(world: World, per_s: float, calm_s: float) -> list[Finding]:
    """calm_s: before and after, in seconds."""
    finding = Finding(
        "Rolling restart of a fleet",
        [
            f"{FLEET} worker processes, {per_s:g} jobs/s. Each in turn: SIGTERM, its end, a new process, until that is"
            " ready.",
        ],
    )
    places = world.fleet(FLEET)
    with world.load("rolling", per_s) as load:
        world.await_flow(load)
        began_at = world.now()
        pause(calm_s)
        restarts_at = world.now()
        for place in places:
            tell_restart(finding, place.restart())
        over_at = world.now()
        pause(calm_s)
        ended_at = world.now()
    account = world.settle(load.ids())
    tell_jobs(finding, account)
    finding.tell("workers that wrote results", len(account.by_worker))
    finding.tell("jobs/s before the first restart", f"{account.per_s(began_at, restarts_at):,.0f}")
    finding.tell("jobs/s while workers were restarted", f"{account.per_s(restarts_at, over_at):,.0f}")
    before_s = account.largest_gap_s(began_at, restarts_at)
    finding.tell("longest time without a finished job before", f"{before_s:.2f} s")
    gap_s = account.largest_gap_s(restarts_at, ended_at)
    finding.check_at_most("longest time without a finished job from the first restart on", gap_s, MAX_GAP_S)
    return [finding]
