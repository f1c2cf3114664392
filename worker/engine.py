"""From a request to its embeddings: tokenize, encode in shared micro-batches, finish. Knows no Redis.

The steps are separate, so that whoever drives them may run them on different threads; one text's failure is
its job's alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from embedq.model import Encoder, ModelError, NonFiniteError, TextTooLongError, TokenizedText
from embedq.model.encoder import CALIBRATED, Output
from embedq.model.precision import postprocess_states
from embedq.model.windows import mean_of_windows
from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker.planning import plan

#: Bytes that the vectors of one job with token output may have.
MAX_TOKEN_OUTPUT_BYTES = 64 * 1024 * 1024

logger = logging.getLogger("embedq.worker")


@dataclass(slots=True, eq=False)
class Work:
    """One job's texts on their way through the encoder, in pieces: a text, or a window of one that is chunked."""

    request: EmbedRequest
    #: of each piece
    tokens: list[TokenizedText]
    #: of each piece, the place of its text
    texts: Sequence[int]
    #: (n,) of each text, as the result reports it
    num_tokens: tuple[int, ...]
    #: filled piece by piece: (pieces, embedding_dim) float32; or of token output (sum of num_tokens, d) as the
    #: result has them
    vectors: NDArray[Any]
    #: pieces not encoded yet
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

    @property
    def output(self) -> Output:
        return self.request.options.output

    @property
    def truncated(self) -> tuple[bool, ...]:
        """(n,)"""
        if self.request.options.chunk:
            return (False,) * len(self.num_tokens)
        return tuple(text.truncated for text in self.tokens)

    def fill(self, place: int, rows: NDArray[np.generic]) -> None:
        """One piece's vector (embedding_dim,), or of token output its vectors (num_tokens, d)."""
        if self.output == "tokens":
            start = sum(self.num_tokens[:place])
            self.vectors[start : start + len(rows)] = rows
        else:
            self.vectors[place] = rows
        self.missing -= 1

    def mean_vectors(self) -> NDArray[np.float32]:
        """(n, embedding_dim) each text's vector: the mean of its windows'."""
        return mean_of_windows(self.vectors, np.bincount(self.texts, minlength=len(self.num_tokens)).tolist())


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of one job: what a micro-batch is made of."""

    work: Work
    place: int

    @property
    def tokens(self) -> TokenizedText:
        return self.work.tokens[self.place]

    @property
    def text_index(self) -> int:
        return self.work.texts[self.place]


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
        self._check_model(request.options.model)
        began_at = time.monotonic()
        try:
            work = self._make_work(request)
        except JobFailedError:
            raise
        except Exception as err:
            raise _job_failure(err) from err
        work.began_at = began_at
        work.tokenize_s = time.monotonic() - began_at
        return work

    def _make_work(self, request: EmbedRequest) -> Work:
        options = request.options
        prompt = self.encoder.resolve_prompt(options.prompt, options.prompt_name)
        if options.chunk:
            chunked = self.encoder.tokenize_windows(request.texts, prompt=prompt, overlap=options.chunk_overlap)
            tokens = [window for text in chunked for window in text.windows]
            texts: Sequence[int] = [index for index, text in enumerate(chunked) for _ in text.windows]
            num_tokens = tuple(text.num_tokens for text in chunked)
        else:
            tokens = self.encoder.tokenize(
                request.texts, prompt=prompt, truncate=options.truncate, truncation_side=options.truncation_side
            )
            texts = range(len(tokens))
            num_tokens = tuple(text.num_tokens for text in tokens)
        vectors = self._room(request, len(tokens), sum(num_tokens))
        return Work(request, tokens, texts, num_tokens, vectors, missing=len(tokens))

    def _room(self, request: EmbedRequest, num_pieces: int, num_tokens: int) -> NDArray[Any]:
        """`Work.vectors`. What cannot be finished is found here, on an empty array, before it is encoded."""
        is_tokens = request.options.output == "tokens"
        width = self.encoder.token_dim if is_tokens else self.encoder.embedding_dim
        finished = self._postprocess(np.empty((0, width), np.float32), request)
        if not is_tokens:
            return np.empty((num_pieces, width), np.float32)
        _check_size(num_tokens, finished)
        return np.empty((num_tokens, finished.shape[1]), finished.dtype)

    def plan(self, works: Sequence[Work]) -> list[list[Piece]]:
        """Micro-batches over all pieces of these jobs, each of one kind of output; the most urgent first."""
        pieces = [Piece(work, place) for work in works for place in range(len(work.tokens))]
        batches: list[list[int]] = []
        for output in get_args(Output):
            places = [place for place, piece in enumerate(pieces) if piece.work.output == output]
            planned = plan([pieces[place].tokens.num_tokens for place in places], self.max_batch_tokens)
            batches += [[places[index] for index in batch] for batch in planned]
        return [[pieces[place] for place in batch] for batch in sorted(batches, key=min)]

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
            vectors = work.vectors
            if work.output == "sentence":
                vectors = self._postprocess(work.mean_vectors(), work.request)
        except Exception as err:
            raise _job_failure(err) from err
        return Embeddings(
            vectors=vectors,
            num_tokens=work.num_tokens,
            truncated=work.truncated,
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
            output=work.output,
            calibration=self.encoder.calibration_digest if work.request.options.precision in CALIBRATED else "",
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
        postprocess = postprocess_states if options.output == "tokens" else self.encoder.postprocess
        return postprocess(
            vectors, normalize=options.normalize, dimensions=options.dimensions, precision=options.precision
        )

    def _encode_isolating(self, pieces: Sequence[Piece]) -> None:
        """A batch that raises is halved until the guilty text stands alone."""
        try:
            rows, finite = self._encode(pieces)
        except Exception as err:
            if len(pieces) == 1:
                pieces[0].work.failure = _encode_failure(err, pieces[0].text_index)
                return
            logger.warning("a micro-batch of %d texts failed (%s); trying its halves", len(pieces), type(err).__name__)
            middle = len(pieces) // 2
            self._encode_isolating(pieces[:middle])
            self._encode_isolating(pieces[middle:])
            return
        for piece, row, is_finite in zip(pieces, rows, finite, strict=True):
            if is_finite:
                piece.work.fill(piece.place, row)
            else:
                index = piece.text_index
                message = f"text {index}: the model's output is not finite"
                piece.work.failure = JobFailedError(message, code="non_finite", text_index=index)

    def _encode(self, pieces: Sequence[Piece]) -> tuple[Iterable[NDArray[np.generic]], list[bool]]:
        """What each piece is filled with, and whether all of it is finite."""
        tokens = [piece.tokens for piece in pieces]
        if pieces[0].work.output == "sentence":
            vectors = self.encoder.encode_tokens(tokens)
            return vectors, [bool(finite) for finite in np.atleast_1d(np.isfinite(vectors).all(axis=1))]
        states = self.encoder.encode_states(tokens)
        requests = (piece.work.request for piece in pieces)
        finished = [self._postprocess(part, request) for part, request in zip(states, requests, strict=True)]
        return finished, [bool(np.isfinite(part).all()) for part in finished]


def _check_size(num_tokens: int, finished: NDArray[np.generic]) -> None:
    """Raises JobFailedError for token output that Redis and the caller should be spared."""
    dimensions, dtype = finished.shape[1], finished.dtype
    size = num_tokens * dimensions * dtype.itemsize
    if size > MAX_TOKEN_OUTPUT_BYTES:
        raise JobFailedError(
            f"{num_tokens:,} tokens x {dimensions} {dtype} are {size:,} bytes of output; at most"
            f" {MAX_TOKEN_OUTPUT_BYTES:,} go: put fewer texts in one job, or ask for float16 or fewer dimensions",
            code="output_too_large",
        )


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
