"""Workers that are not there: their hashes, as they would report themselves."""

from __future__ import annotations

import time
from typing import Any

import orjson

from embedq.producer import keys

#: What a worker tells of itself, by the contract of the field `embedq_figures`.
FIGURES: dict[str, Any] = {
    "v": 1,
    "jobs": 0,
    "texts": 0,
    "tokens": 0,
    "tokens_per_s": 0.0,
    "recent_tokens_per_s": 0.0,
    "tokens_per_byte": 0.25,
    "fill": 0.0,
    "busy": 0.0,
    "held": 0,
    "prefetched_tokens": 0,
    "errors": 0,
    "version": "0.1.0",
    "wire": 1,
    "dtype": "bfloat16",
}


def plant_worker(
    client: Any, name: str, *, queues: str = "embed", state: str = "busy", silent_s: float = 0, **figures: Any
) -> None:
    """With figures if any are given."""
    seconds = time.time() - silent_s
    moment = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(seconds))
    fields: dict[str, Any] = {
        "state": state,
        "queues": queues,
        "hostname": "box",
        "pid": "7",
        "last_heartbeat": moment,
        "birth": moment,
        "embedq_model": "noop:8",
        "embedq_device": "cpu",
    }
    if figures:
        fields["embedq_figures"] = orjson.dumps({**FIGURES, "time": seconds, **figures})
    client.hset(keys.worker(name), mapping=fields)
    client.sadd(keys.WORKERS, keys.worker(name))
