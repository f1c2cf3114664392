"""From a request to its embeddings: tokenize, encode in shared micro-batches, finish. Knows no Redis.

The steps are separate, so that whoever drives them may run them on different threads; one text's failure is
its job's alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedq.model import Encoder, ModelError, NonFiniteError, TextTooLongError, TokenizedText
from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker.planning import plan

logger = logging.getLogger("embedq.worker")


@dataclass(slots=True, eq=False)
class Work:
    """One job's texts on their way through the encoder."""

    request: EmbedRequest
    tokens: list[TokenizedText]
    #: (n, embedding_dim) float32, filled row by row
    vectors: NDArray[np.float32]
    #: rows not filled yet
    missing: int
    #: set once a text could not be encoded; the other rows no longer matter
    failure: JobFailedError | None = None
    began_at: float = field(default_factory=time.monotonic)
    tokenize_s: float = 0.0
    #: what the micro-batches that served this job took, whoever shared them
    encode_s: float = 0.0
    #: this job's share of them, by tokens
    busy_s: float = 0.0
    batch_texts: int = 0
    batch_tokens: int = 0

    @property
    def is_done(self) -> bool:
        return self.failure is not None or self.missing == 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One text of one job: what a micro-batch is made of."""

    work: Work
    index: int

    @property
    def tokens(self) -> TokenizedText:
        return self.work.tokens[self.index]


class Engine:
    """Drives one encoder."""

    def __init__(self, encoder: Encoder, max_batch_tokens: int | None = None, worker_name: str = "") -> None:
        self.encoder = encoder
        # An encoder may have found on its device that less fits than was asked for.
        self.max_batch_tokens = min(max_batch_tokens or encoder.max_batch_tokens, encoder.max_batch_tokens)
        self.worker_name = worker_name

    def tokenize(self, request: EmbedRequest) -> Work:
        """Raises JobFailedError for what this model cannot do: another model, an unknown prompt, a long text.

        What an encoder raises beyond ModelError is its job's failure too, with the code `internal`.
        """
        options = request.options
        self._check_model(options.model)
        began_at = time.monotonic()
        try:
            prompt = self.encoder.resolve_prompt(options.prompt, options.prompt_name)
            tokens = self.encoder.tokenize(
                request.texts, prompt=prompt, truncate=options.truncate, truncation_side=options.truncation_side
            )
            if options.dimensions is not None or options.precision != "float32":
                # Asked of an empty array, so that a job which cannot be finished is never encoded.
                self._postprocess(np.empty((0, self.encoder.embedding_dim), np.float32), request)
        except Exception as err:
            raise _job_failure(err) from err
        shape = (len(tokens), self.encoder.embedding_dim)
        work = Work(request, tokens, np.empty(shape, np.float32), missing=len(tokens), began_at=began_at)
        work.tokenize_s = time.monotonic() - began_at
        return work

    def plan(self, works: Sequence[Work]) -> list[list[Piece]]:
        """Micro-batches over all texts of these jobs."""
        pieces = [Piece(work, index) for work in works for index in range(len(work.tokens))]
        batches = plan([piece.tokens.num_tokens for piece in pieces], self.max_batch_tokens)
        return [[pieces[index] for index in batch] for batch in batches]

    def encode(self, batch: Sequence[Piece]) -> None:
        """Fills the rows of one micro-batch, and marks the jobs whose texts cannot be encoded as failed."""
        pieces = [piece for piece in batch if piece.work.failure is None]
        if not pieces:
            return
        began_at = time.monotonic()
        self._encode_isolating(pieces)
        took_s = time.monotonic() - began_at
        num_tokens = sum(piece.tokens.num_tokens for piece in pieces)
        for piece in pieces:
            piece.work.busy_s += took_s * piece.tokens.num_tokens / num_tokens
        for work in dict.fromkeys(piece.work for piece in pieces):
            work.encode_s += took_s
            work.batch_texts = max(work.batch_texts, len(pieces))
            work.batch_tokens = max(work.batch_tokens, num_tokens)
        logger.info(
            "micro-batch: %d texts of %d jobs, %d tokens, %.0f ms",
            *(len(pieces), len({id(piece.work) for piece in pieces}), num_tokens, took_s * 1000),
        )

    def finish(self, work: Work, queued_s: float = 0.0) -> Embeddings:
        """The job's result. Raises JobFailedError if one of its texts failed."""
        if work.failure is not None:
            raise work.failure
        try:
            vectors = self._postprocess(work.vectors, work.request)
        except Exception as err:
            raise _job_failure(err) from err
        return Embeddings(
            vectors=vectors,
            num_tokens=tuple(text.num_tokens for text in work.tokens),
            truncated=tuple(text.truncated for text in work.tokens),
            model=self.encoder.name,
            revision=self.encoder.revision,
            worker=self.worker_name,
            timings=Timings(
                queued_s=queued_s,
                tokenize_s=work.tokenize_s,
                encode_s=work.encode_s,
                total_s=queued_s + time.monotonic() - work.began_at,
                batch_texts=work.batch_texts,
                batch_tokens=work.batch_tokens,
            ),
        )

    def run(self, request: EmbedRequest) -> Embeddings:
        """One request from end to end. Raises JobFailedError."""
        work = self.tokenize(request)
        for batch in self.plan([work]):
            self.encode(batch)
        return self.finish(work)

    def _check_model(self, wanted: str | None) -> None:
        name = self.encoder.name
        if wanted is not None and wanted != name and not name.endswith(f"/{wanted}"):
            raise JobFailedError(f"the job wants model {wanted}, this worker serves {name}", code="wrong_model")

    def _postprocess(self, vectors: NDArray[np.float32], request: EmbedRequest) -> NDArray[np.generic]:
        options = request.options
        return self.encoder.postprocess(
            vectors, normalize=options.normalize, dimensions=options.dimensions, precision=options.precision
        )

    def _encode_isolating(self, pieces: Sequence[Piece]) -> None:
        """A batch that raises is halved until the guilty text stands alone."""
        try:
            rows = self.encoder.encode_tokens([piece.tokens for piece in pieces])
        except Exception as err:
            if len(pieces) == 1:
                pieces[0].work.failure = _encode_failure(err, pieces[0].index)
                return
            logger.warning("a micro-batch of %d texts failed (%s); trying its halves", len(pieces), type(err).__name__)
            middle = len(pieces) // 2
            self._encode_isolating(pieces[:middle])
            self._encode_isolating(pieces[middle:])
            return
        finite = np.atleast_1d(np.isfinite(rows).all(axis=1))
        for piece, row, is_finite in zip(pieces, rows, finite, strict=True):
            if is_finite:
                piece.work.vectors[piece.index] = row
                piece.work.missing -= 1
            else:
                message = f"text {piece.index}: the model's output is not finite"
                piece.work.failure = JobFailedError(message, code="non_finite", text_index=piece.index)


def _job_failure(err: Exception) -> JobFailedError:
    if isinstance(err, ModelError):
        index = err.text_index if isinstance(err, TextTooLongError) else None
        return JobFailedError(str(err), code=err.code, retryable=err.retryable, text_index=index)
    logger.error("the encoder failed on a job", exc_info=err)
    return JobFailedError(f"{type(err).__name__}: {err}", code="internal", retryable=True)


def _encode_failure(err: Exception, index: int) -> JobFailedError:
    """Retryable, but for NaN and Inf: the text alone may pass another day; out of memory is the usual reason."""
    if isinstance(err, NonFiniteError):
        return JobFailedError(f"text {index}: {err.reason}", code=err.code, text_index=index)
    message = f"text {index} could not be encoded: {type(err).__name__}: {err}"
    return JobFailedError(message, code="encode_failed", retryable=True, text_index=index)
