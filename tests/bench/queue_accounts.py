"""What an embedq worker tells of its own work: in the results its micro-batches, in its last log line its time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from embedq.producer import EmbedQueue, keys

#: In the worker's last words: `device: encoding 1.2 s, starved 0.1 s (...); CPU: claim 0.25 s, tokenize 0.31 s`.
_DEVICE = re.compile(r"\bdevice: encoding (\d+(?:\.\d+)?) s, starved (\d+(?:\.\d+)?) s")
_STAGES = re.compile(r"\bCPU: (.*)")
_STAGE = re.compile(r"([a-z][a-z ]*?) (\d+(?:\.\d+)?) s\b")
SCAN_KEYS = 1000


def num_micro_batches(client: Any) -> float:
    """Of all finished jobs of one text: a job of a micro-batch of n texts is one nth of it."""
    with EmbedQueue(connection=client) as queue:
        found = client.scan_iter(f"{keys.JOB_PREFIX}*", count=SCAN_KEYS)
        ids = [key.decode().removeprefix(keys.JOB_PREFIX) for key in found]
        return sum_of_shares(queue.result(job_id, timeout=0).timings.batch_texts for job_id in ids)


def sum_of_shares(batch_texts: Iterable[int]) -> float:
    return sum(1 / number for number in batch_texts)


def stage_seconds(logs: Iterable[str]) -> dict[str, float]:
    """CPU of each stage by the workers' own account, all of them together; empty where they give none."""
    total: Counter[str] = Counter()
    for log in logs:
        for account in _STAGES.findall(log)[-1:]:
            total.update({name: float(number) for name, number in _STAGE.findall(account)})
    return dict(total)


def starved_share(logs: Iterable[str]) -> float | None:
    """Of the time with work that for which the device had to wait, in all of them; None where they don't tell."""
    encoding_s = starved_s = 0.0
    for log in logs:
        for encoding, starved in _DEVICE.findall(log)[-1:]:
            encoding_s += float(encoding)
            starved_s += float(starved)
    return starved_s / (encoding_s + starved_s) if encoding_s else None
