"""What becomes of a micro-batch that fails: all texts that can be encoded are, and a job fails by its own text alone.

Knows kinds of failure and how much memory has room for; how texts are encoded is the engine's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from embedq.model import DeviceLostError, Encoder, NonFiniteError
from embedq.producer.errors import JobFailedError
from embedq.worker.budget import MemoryBudget
from embedq.worker.failures import ENDINGS, NON_FINITE, OUT_OF_MEMORY, text_failure

if TYPE_CHECKING:
    from embedq.worker.engine import Piece

#: Encodes pieces with an encoder, all of them or none.
EncodePieces = Callable[[Sequence["Piece"], Encoder], None]
#: Around every call of the encoder: whoever waits for it wants to know which texts it has.
Watching = Callable[[Sequence["Piece"]], AbstractContextManager[object]]

logger = logging.getLogger("embedq.worker")


class Isolation:
    """Attributes: memory (its budget); oom_splits (micro-batches cut in two because memory ran out); num_in_float32
    (texts whose vectors were not finite otherwise); at_work (the pieces of the latest call of the encoder).
    """

    def __init__(self, encoder: Encoder, encode: EncodePieces, max_batch_tokens: int, watching: Watching) -> None:
        self._encoder = encoder
        self._encode = encode
        self._watching = watching
        self.at_work: Sequence[Piece] = ()
        self.memory = MemoryBudget(max_batch_tokens)
        self.oom_splits = 0
        self.num_in_float32 = 0

    def encode(self, pieces: Sequence[Piece], num_tokens: int) -> None:
        """One micro-batch, of so many tokens. Jobs whose text fails alone have a failure then.

        Raises DeviceLostError.
        """
        limit, oom_splits = self.memory.limit, self.oom_splits
        self._encode_all(pieces)
        if self.memory.limit < limit:
            logger.warning(
                "out of memory: micro-batches have at most %d tokens for a while, not %d", self.memory.limit, limit
            )
        elif self.oom_splits == oom_splits:
            self.memory.succeeded(num_tokens)
        if self.memory.is_whole and limit < self.memory.full:
            logger.info("memory suffices again: micro-batches have up to %d tokens", self.memory.full)

    def _encode_all(self, pieces: Sequence[Piece]) -> None:
        """What fails is halved until the guilty text stands alone."""
        while pieces:
            part = pieces[: self._num_fitting(pieces)]
            pieces = pieces[len(part) :]
            failure = self._attempt(part, self._encoder)
            if failure is None:
                continue
            if len(part) == 1:
                self._try_again(part[0], failure)
            else:
                self._halve(part, failure)
            pieces = _of_good_jobs(pieces)

    def _num_fitting(self, pieces: Sequence[Piece]) -> int:
        """How many of the first memory has room for now, at least one."""
        if self.memory.is_whole:
            return len(pieces)
        ends = itertools.accumulate(work.tokens[place].num_tokens for work, place in pieces)
        fitting = itertools.takewhile(lambda end: end <= self.memory.limit, ends)
        return max(1, sum(1 for _ in fitting))

    def _attempt(self, pieces: Sequence[Piece], encoder: Encoder) -> JobFailedError | None:
        """Why it failed, said of the first text. Not the error: that holds all that the attempt had in memory."""
        self.at_work = pieces
        try:
            with self._watching(pieces):
                self._encode(pieces, encoder)
        except (DeviceLostError, *ENDINGS):
            raise
        except BaseException as err:
            if not isinstance(err, (MemoryError, NonFiniteError)):
                logger.warning("%d texts together could not be encoded: %s", len(pieces), type(err).__name__)
            logger.debug("the encoder failed", exc_info=err)
            work, place = pieces[0]
            return text_failure(err, work.texts[place])
        return None

    def _halve(self, pieces: Sequence[Piece], failure: JobFailedError) -> None:
        if failure.code == OUT_OF_MEMORY:
            self._encoder.release_memory()
            self.memory.shrink(sum(work.tokens[place].num_tokens for work, place in pieces))
            self.oom_splits += 1
        middle = len(pieces) // 2
        self._encode_all(pieces[:middle])
        self._encode_all(_of_good_jobs(pieces[middle:]))

    def _try_again(self, piece: Piece, failure: JobFailedError) -> None:
        """A text that failed alone: once more with all the memory there is, or in float32."""
        work, _ = piece
        if failure.code == NON_FINITE:
            work.failure = self._attempt_in_float32(piece, failure)
        elif failure.code == OUT_OF_MEMORY:
            self._encoder.release_memory()
            work.failure = self._attempt([piece], self._encoder)
            if work.failure is not None:
                self._encoder.release_memory()
                self.memory.forgive()
        else:
            work.failure = failure

    def _attempt_in_float32(self, piece: Piece, failure: JobFailedError) -> JobFailedError | None:
        exact = self._encoder.in_float32()
        if exact is None:
            return failure
        again = self._attempt([piece], exact)
        if again is not None:
            exact.release_memory()
            return again if again.code == NON_FINITE else failure
        self.num_in_float32 += 1
        logger.log(
            logging.DEBUG if self.num_in_float32 > 1 else logging.WARNING,
            "a vector was not finite by %s and was made in float32; further ones are told at DEBUG",
            self._encoder.placement,
        )
        return None


def _of_good_jobs(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Without those of jobs that have failed by another text."""
    return [piece for piece in pieces if piece[0].failure is None]
