"""Exercise: two versions of workers and producers on one queue, from the older to the newer one and back again."""

from __future__ import annotations

from pathlib import Path

from tests.ops.finding import Finding
from tests.ops.load import PRODUCER
from tests.ops.places import Place, Silent
from tests.ops.rolling import FLEET, MAX_GAP_S
from tests.ops.world import WORKER, World, pause, tell_jobs

#: Runs what follows as the next version.
NEWER = "tests.ops.newer"


def wire_upgrade(world: World, per_s: float, calm_s: float) -> list[Finding]:
    """From a version to one whose jobs it cannot read."""
    finding = Finding(
        "Rolling upgrade to a version with another wire format",
        [
            f"{FLEET} workers of the older version; producers of both, {per_s / 2:g} jobs/s each. Jobs of the newer one"
            " wait until there is a worker that reads them. All workers are replaced one after the other, and all but"
            " one again by older ones.",
        ],
    )
    older = world.fleet(FLEET)
    newer = [world.worker(f"newer-{place}", modules=[NEWER, WORKER]) for place in range(FLEET)]
    with world.load("v1", per_s / 2) as old_load, world.load("v2", per_s / 2, modules=[NEWER, PRODUCER]) as new_load:
        world.await_flow(old_load)
        pause(calm_s)
        parked = world.num_parked()
        early = sum(status == "finished" for status in world.queue.statuses(new_load.ids()).values())
        finding.check("jobs of the newer version parked without a worker for them", parked, "some", parked > 0)
        finding.check("of them done by an older one", early, "0", early == 0)
        for old, new in zip(older, newer, strict=True):
            replace(world, old, new)
        world.await_flow(new_load)
        pause(calm_s)
        for old, new in list(zip(older, newer, strict=True))[1:]:
            replace(world, new, old)
        pause(calm_s)
    accounts = {"older": world.settle(old_load.ids()), "newer": world.settle(new_load.ids())}
    for version, account in accounts.items():
        finding.tell(f"of the {version} version's producer:", "")
        tell_jobs(finding, account)
    pids = [pid for place in newer for pid in place.pids]
    strange = accounts["newer"].num_jobs - accounts["newer"].num_done_by(pids)
    finding.check("newer jobs done by older workers", strange, "0", strange == 0)
    mixed = accounts["older"].num_done_by(pids)
    finding.check("older jobs done by newer workers", f"{mixed:,}", "some", mixed > 0)
    finding.check("jobs parked at the end", world.num_parked(), "0", world.num_parked() == 0)
    return [finding]


def release_upgrade(world: World, per_s: float, calm_s: float, older_sources: Path, release: str) -> list[Finding]:
    """From the code of an earlier release to this one."""
    finding = Finding(
        "Rolling upgrade from an earlier release",
        [
            f"{FLEET} workers and a producer of {release}, and a producer of this version, {per_s / 2:g} jobs/s each."
            " All workers are replaced by this version's one after the other, and again by the earlier ones.",
        ],
    )
    command = world.worker_command()
    older: list[Place] = [
        world.keep(Silent(f"older-{place}", command, world.folder, [older_sources])) for place in range(FLEET)
    ]
    newer: list[Place] = [world.worker(f"newer-{place}") for place in range(FLEET)]
    for place in older:
        place.await_ready()
    with (
        world.load("earlier", per_s / 2, sources=[older_sources]) as old_load,
        world.load("present", per_s / 2) as new_load,
    ):
        world.await_flow(old_load)
        world.await_flow(new_load)
        first_at = world.now()
        pause(calm_s)
        for old, new in zip(older, newer, strict=True):
            replace(world, old, new)
        pause(calm_s)
        for old, new in zip(older, newer, strict=True):
            replace(world, new, old)
        pause(calm_s)
        last_at = world.now()
    finding.tell("seconds from the first to the last replacement", f"{last_at - first_at:.0f}")
    for name, load in (("earlier", old_load), ("present", new_load)):
        account = world.settle(load.ids())
        finding.tell(f"of the {name} version's producer:", "")
        tell_jobs(finding, account)
        finding.check_at_most(
            "longest time without a finished job", account.largest_gap_s(first_at, last_at), MAX_GAP_S
        )
        done = account.num_done_by([pid for place in newer for pid in place.pids])
        both = f"{account.num_jobs - done:,}, {done:,}"
        finding.check("done by earlier and by present workers", both, "both", 0 < done < account.num_jobs)
    return [finding]


def replace(world: World, old: Place, new: Place) -> None:
    """The new one first, as a deploy with a surge does it."""
    world.keep(new)
    new.await_ready()
    old.stop()
