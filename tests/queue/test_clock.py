"""The server's clock in our scripts: RQ's format, whatever the date."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import redis
from rq.utils import str_to_date

from embedq.producer import scripts
from embedq.producer.connection import connect


def _timestamp_at(client: redis.Redis, second: int, microsecond: int) -> str:
    """The script's own function, told another time."""
    source = scripts.source("embedq.producer", "common").replace(
        "redis.call('TIME')", f"{{'{second}', '{microsecond}'}}"
    )
    told: bytes = client.eval(source + "return timestamp()", 0)  # type: ignore[assignment, no-untyped-call]
    return told.decode()


def test_the_servers_time_is_written_as_rq_writes_it(each_url: str) -> None:
    moments = [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2000, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2026, 3, 1, 0, 0, 0, 7, tzinfo=UTC),
        datetime(2100, 2, 28, 12, 30, tzinfo=UTC),
        *(datetime(2023, 12, 25, tzinfo=UTC) + timedelta(days=days, seconds=days) for days in range(0, 1500, 13)),
    ]
    with connect(each_url) as client:
        for moment in moments:
            told = _timestamp_at(client, int(moment.timestamp()), moment.microsecond)
            assert told == moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            assert str_to_date(told) == moment
