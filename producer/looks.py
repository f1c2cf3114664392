"""A look at many jobs in one round trip: has it ended, and what is the last entry of its result stream. Awaited."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import redis
import redis.asyncio

from embedq.producer.connection import describe, translate
from embedq.producer.mailbox import Verdict
from embedq.producer.outcomes import BEFORE_ALL, final_outcome, is_over, look_commands, read_status


class Found(NamedTuple):
    #: what the job came to, None if it has not ended
    verdict: Verdict | None
    #: the entry after which its stream is to be read
    last: bytes = BEFORE_ALL


async def look(client: redis.asyncio.Redis, job_ids: Iterable[str]) -> dict[str, Found]:
    """One bad job fails alone. Raises redis.RedisError for what fails them all."""
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    pipeline: Any = client.pipeline(transaction=True)
    for command in look_commands(ids):
        pipeline.execute_command(*command)
    replies = await pipeline.execute(raise_on_error=False)
    place = describe(client)
    return {
        job_id: _found(job_id, place, *reply) for job_id, *reply in zip(ids, replies[::2], replies[1::2], strict=True)
    }


def _found(job_id: str, place: str, field: Any, entries: Any) -> Found:
    for reply in (field, entries):
        if isinstance(reply, redis.RedisError):
            return Found(partial(translate, reply, place))
    status, entry = read_status(field), entries[0] if entries else None
    if is_over(status):
        return Found(partial(final_outcome, job_id, status, entry))
    return Found(None, entry[0] if entry else BEFORE_ALL)
