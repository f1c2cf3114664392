"""Waiting for results of several servers at once: each has its reader, and one mailbox a call hears of them all.

A shard that cannot be reached costs its own jobs alone: their outcome is the QueueConnectionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from embedq.producer.async_results import AsyncReader
from embedq.producer.errors import EmbedqError
from embedq.producer.mailbox import Mailbox, Verdict
from embedq.producer.outcomes import Outcome, is_unknown
from embedq.producer.rendezvous import Rendezvous


class _ShardMailbox(Mailbox):
    """What the reader of one shard tells, passed on."""

    __slots__ = ("_whole",)

    def __init__(self, whole: Mailbox) -> None:
        super().__init__()
        self._whole = whole

    def tell(self, job_id: str, verdict: Verdict | None) -> None:
        self.unlooked.discard(job_id)
        if verdict is not None:
            self.waiting.discard(job_id)
        self._whole.tell(job_id, verdict)

    def fail(self, make_error: Callable[[], EmbedqError]) -> None:
        for job_id in list(self.waiting):
            self.tell(job_id, make_error)
        self.forget_all()


class _WholeMailbox(Mailbox):
    """One call over all shards."""

    __slots__ = ("_reader", "boxes", "ranks")

    def __init__(self, reader: ShardedReader) -> None:
        super().__init__()
        self._reader = reader
        #: by shard
        self.boxes: dict[str, _ShardMailbox] = {}
        #: of jobs that may be older than a shard: how many shards did not know them
        self.ranks: dict[str, int] = {}

    def forget_all(self) -> None:
        super().forget_all()
        self.ranks.clear()

    async def news(
        self, deadline: float | None, *, unless: Callable[[], bool] = lambda: False
    ) -> list[tuple[str, Outcome]]:
        while True:
            ended = await super().news(deadline, unless=unless)
            told = [(job_id, outcome) for job_id, outcome in ended if not self._is_elsewhere(job_id, outcome)]
            if told or not ended:
                return told

    def _is_elsewhere(self, job_id: str, outcome: Outcome) -> bool:
        """Whether another shard is asked now."""
        rank = self.ranks.pop(job_id, None)
        return rank is not None and is_unknown(job_id, outcome) and self._reader.ask(self, job_id, rank + 1)


class ShardedReader(AsyncReader):
    """Over the readers of all shards."""

    def __init__(self, shards: Rendezvous, readers: Mapping[str, AsyncReader]) -> None:
        self._shards, self._readers = shards, readers

    def mailbox(self) -> Mailbox:
        return _WholeMailbox(self)

    def subscribe(self, call: Mailbox, job_ids: Iterable[str], *, are_fresh: bool = False) -> None:
        """Fresh jobs are where their ids say; others may be older than a shard."""
        ids = list(job_ids)
        if not are_fresh:
            _whole(call).ranks.update(dict.fromkeys(ids, 0))
        for shard, part in self._shards.split(ids, key=str).items():
            self._subscribe(_whole(call), shard, part, are_fresh=are_fresh)

    def ask(self, call: _WholeMailbox, job_id: str, rank: int) -> bool:
        """Asks the shard of that rank for a job that those before it do not know; false if there is none."""
        if rank >= len(self._shards.names):
            return False
        call.ranks[job_id] = rank
        self._subscribe(call, self._shards.ranked(job_id)[rank], [job_id], are_fresh=False)
        return True

    def unsubscribe(self, call: Mailbox) -> None:
        for shard, box in _whole(call).boxes.items():
            self._readers[shard].unsubscribe(box)
        call.forget_all()

    async def close(self) -> None:
        for reader in self._readers.values():
            await reader.close()

    def _subscribe(self, call: _WholeMailbox, shard: str, job_ids: list[str], *, are_fresh: bool) -> None:
        call.waiting.update(job_ids)
        if not are_fresh:
            call.unlooked.update(job_ids)
        box = call.boxes.setdefault(shard, _ShardMailbox(call))
        self._readers[shard].subscribe(box, job_ids, are_fresh=are_fresh)


def _whole(call: Mailbox) -> _WholeMailbox:
    if not isinstance(call, _WholeMailbox):
        raise TypeError("a call of several shards has a mailbox of their reader's")
    return call
