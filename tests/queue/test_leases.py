"""The lease keeper's thread: nothing that is done beside keeps it from renewing."""

from __future__ import annotations

from typing import Any

import redis

from embedq.producer import EmbedQueue, keys
from embedq.worker.claims import RECOVER_JOBS, ClaimStore, Recovered, Renewed
from embedq.worker.leases import LeaseKeeper
from tests.conftest import until


class CountingStore:
    lease_s = 1.0

    def __init__(self) -> None:
        self.renewals = 0

    def renew(self, *_: Any) -> Renewed:
        self.renewals += 1
        return Renewed([], is_known=True)

    def recover(self, _queue: str) -> Recovered:
        return Recovered(0, 0, 0, [])


def test_a_tick_that_fails_each_time_costs_no_renewal() -> None:
    ticks: list[int] = []

    def broken() -> None:
        ticks.append(1)
        raise redis.ResponseError("WRONGTYPE") if len(ticks) % 2 else KeyError("a bug")

    store = CountingStore()
    keeper = LeaseKeeper(
        store,  # type: ignore[arg-type]
        ["embed"],
        60,
        on_abandoned=lambda *_: None,
        on_forgotten=lambda: None,
        on_tick=broken,
    )
    keeper.start()
    until(lambda: store.renewals >= 8 and len(ticks) >= 2)
    keeper.stop()


def test_one_round_takes_back_all_that_a_dead_worker_held(queue: EmbedQueue) -> None:
    queue.enqueue_many(str(number) for number in range(2 * RECOVER_JOBS + 10))
    store = ClaimStore(queue._client, "w1", 60)
    assert len(store.claim(["embed"], 10_000, 10**9).claims) == 2 * RECOVER_JOBS + 10
    dead = dict.fromkeys(queue._redis.zrange(keys.started("embed"), 0, -1), 1)
    queue._redis.zadd(keys.started("embed"), dead)
    keeper = LeaseKeeper(store, ["embed"], 60, on_abandoned=lambda *_: None, on_forgotten=lambda: None)
    keeper.recover()
    assert queue.depth() == 2 * RECOVER_JOBS + 10
    assert queue._redis.zcard(keys.started("embed")) == 0
