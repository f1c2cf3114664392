"""The bad network: what it loses is lost for its client alone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from embedq.worker.redis_server import RedisServer
from tests.conftest import redis_binaries

ROOT = Path(__file__).resolve().parents[2]


class Network:
    """A server, a client past the proxy and one through it, which tries nothing twice."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "tests.chaos.proxy", str(port), "0"]
        self._proxy = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._proxy.stdout is not None
        self.direct = redis.Redis(port=port)
        self.through = redis.Redis(port=int(self._proxy.stdout.readline()), retry=None, socket_timeout=10)

    def order(self, **order: Any) -> None:
        assert self._proxy.stdin is not None
        self._proxy.stdin.write(json.dumps(order) + "\n")
        self._proxy.stdin.flush()
        time.sleep(0.1)  # nothing tells when it was read

    def told(self) -> Any:
        assert self._proxy.stdout is not None
        return json.loads(self._proxy.stdout.readline())

    def close(self) -> None:
        self.direct.close()
        self.through.close()
        self._proxy.terminate()
        self._proxy.communicate()


@pytest.fixture
def network(short_path: Path) -> Iterator[Network]:
    with RedisServer(short_path, port=0, binary=redis_binaries()[0]) as server:
        network = Network(int(server.port or 0))
        with contextlib.closing(network):
            yield network


def test_a_lost_reply_is_of_a_request_that_was_done(network: Network) -> None:
    network.order(what="lose_reply", marker="count-me", times=1, for_s=30)
    assert network.through.incr("another") == 1
    with pytest.raises(redis.ConnectionError):
        network.through.incr("count-me")
    assert network.told() == {"did": "lost_reply"}
    assert network.direct.get("count-me") == b"1"
    assert network.through.incr("count-me") == 2


def test_a_lost_request_was_not_done(network: Network) -> None:
    network.order(what="lose_request", marker="count-me", times=2, for_s=30)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            network.through.incr("count-me")
    assert network.direct.get("count-me") is None
    assert network.through.incr("count-me") == 1


def test_of_a_torn_request_only_the_first_half_is_done(network: Network) -> None:
    network.order(what="tear", marker="count-me", times=1, for_s=30)
    pipeline = network.through.pipeline(transaction=False)
    for _ in range(10):
        pipeline.incr("count-me")
    with pytest.raises(redis.ConnectionError):
        pipeline.execute()
    assert network.told() == {"did": "torn_request"}
    assert 0 < int(network.direct.get("count-me")) < 10


def test_a_loss_that_nothing_met_in_time_is_forgotten(network: Network) -> None:
    network.order(what="lose_request", marker="count-me", times=1, for_s=0.05)
    assert network.through.incr("count-me") == 1


def test_a_cut_ends_every_connection_in_the_middle_of_a_call(network: Network) -> None:
    waiting = network.through.connection_pool.get_connection()
    waiting.send_command("BLPOP", "nothing", 10)
    network.order(what="cut")
    with pytest.raises(redis.ConnectionError):
        waiting.read_response()
    assert network.told() == {"did": "cut", "connections": 1}
    assert network.through.ping()


@pytest.mark.parametrize("order", [{"what": "stall", "for_s": 0.6}, {"what": "delay", "for_s": 5, "delay_s": 0.2}])
def test_what_is_held_up_comes_all_the_same(network: Network, order: dict[str, Any]) -> None:
    network.through.ping()
    began_at = time.monotonic()
    network.order(**order)
    assert network.through.incr("slow") == 1
    assert time.monotonic() - began_at >= 0.3
