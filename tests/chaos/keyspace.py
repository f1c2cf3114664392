"""What of Redis' keys a run explains; everything else is a stray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from embedq.producer import keys
from tests.chaos.checks import Violation

#: What stays for good, or goes by itself: the sets of queues and of workers, RQ's lock of its groups' clean-up.
LASTING = (keys.QUEUES, keys.WORKERS, f"{keys.PREFIX}:clean_groups")
#: What is kept of a dead worker until it expires, by the end of its key.
WORKER_ENDS = ("", ":claim")


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    #: seconds; -1: kept for good
    ttl_s: int


def strays(found: Iterable[Key], queue: str, is_kept: Callable[[str], bool]) -> Iterator[Violation]:
    """`is_kept`: whether the result of a job of that id is still to be there, or may be."""
    lasting = {*LASTING, keys.finished(queue), keys.failed(queue), keys.canceled(queue)}
    lasting |= {f"{keys.WORKERS}:{queue}", f"{keys.PREFIX}:clean_registries:{queue}"}
    for key in found:
        reason = _reason(key, lasting, is_kept)
        if reason is not None:
            yield Violation("stray", key.name, reason)


def _reason(key: Key, lasting: set[str], is_kept: Callable[[str], bool]) -> str | None:
    """Why a key should not be there; None if it may."""
    if key.name in lasting:
        return None
    if (job_id := _job_of(key.name)) is not None:
        if not is_kept(job_id):
            return "of a job that should be gone, or never was"
        return None if key.ttl_s >= 0 else "of an ended job, and it never expires"
    prefix = keys.worker("")
    if key.name.startswith(prefix):
        name = key.name.removeprefix(prefix)
        if not any(name.endswith(end) and ":" not in name.removesuffix(end) for end in WORKER_ENDS):
            return "of a worker, and nothing that one leaves"
        return None if key.ttl_s >= 0 else "of a worker, and it never expires"
    return "nothing that is known leaves such a key"


def _job_of(name: str) -> str | None:
    """The id of the job whose hash, result, or relatives stand under this key."""
    for key_of in (keys.dependencies, keys.dependents, keys.results, keys.job):
        prefix, suffix = key_of("*").split("*")
        if name.startswith(prefix) and name.endswith(suffix):
            return name[len(prefix) : len(name) - len(suffix)]
    return None
