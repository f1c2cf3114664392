"""Which shard an id belongs to: the same for everybody, balanced, and moved by nothing but a new shard's share."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.producer import ConfigurationError
from embedq.producer.rendezvous import Rendezvous
from embedq.producer.shards import read_urls, shard_name, shard_urls

names = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=8, unique=True)
ids = st.text(min_size=1, max_size=40)


@given(names, ids, st.randoms())
def test_the_order_in_which_shards_are_named_decides_nothing(
    shards: list[str], job_id: str, chance: random.Random
) -> None:
    shuffled = list(shards)
    chance.shuffle(shuffled)
    assert Rendezvous(shards).ranked(job_id) == Rendezvous(shuffled).ranked(job_id)
    assert Rendezvous(shards).home(job_id) == Rendezvous(shards).ranked(job_id)[0]


@given(names, st.text(min_size=21, max_size=25), ids)
def test_a_shard_more_takes_ids_to_itself_and_leaves_the_others_ranks(shards: list[str], new: str, job_id: str) -> None:
    before, after = Rendezvous(shards), Rendezvous([*shards, new])
    assert [shard for shard in after.ranked(job_id) if shard != new] == before.ranked(job_id)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_shards_get_even_parts_and_a_new_one_its_own_alone(number: int) -> None:
    shards = [f"redis-{place}:6379/0" for place in range(number)]
    everything = [f"job-{place}" for place in range(20_000)]
    parts = Rendezvous(shards).split(everything, key=str)
    assert all(0.9 < len(part) * number / len(everything) < 1.1 for part in parts.values())
    more = Rendezvous([*shards, "new:6379/0"])
    moved = [job_id for shard, part in parts.items() for job_id in part if more.home(job_id) != shard]
    assert 0.9 < len(moved) * (number + 1) / len(everything) < 1.1


def test_where_an_id_belongs_never_changes_with_a_release() -> None:
    shards = Rendezvous(["redis-1:6379/0", "redis-2:6379/0", "redis-3:6379/0"])
    assert [shards.home(job_id)[6] for job_id in ("otters", "kelp", "a", "b", "c", "d", "e", "f")] == list("13233313")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://user:secret@Redis-1:6380/2?ssl_ca_certs=/ca.pem", "redis-1:6380/2"),
        ("redis://", "localhost:6379/0"),
        ("rediss://redis-1", "redis-1:6379/0"),
        ("redis://redis-1?db=3", "redis-1:6379/3"),
        ("unix:///run/redis.sock?db=1", "/run/redis.sock/1"),
        ("redis+sentinel://me:secret@b,a:1/mymaster", "mymaster/0"),
        ("rediss+sentinel://a,b/mymaster/4", "mymaster/4"),
    ],
)
def test_a_shard_is_called_by_where_it_is(url: str, name: str) -> None:
    assert shard_name(url) == name


def test_a_setting_names_several_servers_with_white_space_between_them() -> None:
    assert read_urls(" redis://a\n old=redis://c:1/2  redis+sentinel://x,y/m/0 ") == {
        "a:6379/0": "redis://a",
        "old": "redis://c:1/2",
        "m/0": "redis+sentinel://x,y/m/0",
    }
    assert read_urls("a:6379/0=redis://moved") == {"a:6379/0": "redis://moved"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "one shard at least"),
        ("redis://a", "a list of Redis URLs"),
        (["redis://a", "redis://x:y@a:6379/0"], "two shards are called a:6379/0"),
        ({"": "redis://a"}, "name"),
        ({"a\nb": "redis://a"}, "name"),
        (["redis://:secret@[::1"], r"redis://\.\.\. cannot be read"),
        ([7], "cannot be read"),
    ],
)
def test_shards_that_cannot_be_are_refused_without_their_secrets(given: object, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        shard_urls(given)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
