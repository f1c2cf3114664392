"""From a request to its embeddings: tokenize, encode in shared micro-batches, finish. Knows no Redis.

The steps are separate, so that whoever drives them may run them on different threads; one text's failure is
its job's alone.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedq.model import DeviceLostError, Encoder, NonFiniteError, TokenizedText
from embedq.model.encoder import CALIBRATED, Output
from embedq.model.precision import postprocess_states
from embedq.model.windows import mean_of_windows
from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import JobFailedError
from embedq.producer.options import EmbedOptions
from embedq.producer.wire import EmbedRequest
from embedq.worker.failures import ENDINGS, job_failure
from embedq.worker.isolation import Isolation, Watching
from embedq.worker.planning import ReadyJob, ReadyTexts
from embedq.worker.telemetry.batch_log import BatchLog
from embedq.worker.telemetry.observer import Encoded, Observer

#: Bytes that the vectors of one job with token output may have.
MAX_TOKEN_OUTPUT_BYTES = 64 * 1024 * 1024
#: Texts a job from which finishing it together with others costs more, for copies, than it saves in calls.
TEXTS_TO_FINISH_ALONE = 16
#: Options remembered as checked: callers could send a new prompt with each job.
MAX_CHECKED_OPTIONS = 256

#: Texts with one vector and texts with one a token never share a micro-batch.
_KINDS = {"sentence": 0, "tokens": 1}


@dataclass(slots=True, eq=False)
class Work:
    """One job's texts on their way through the encoder, in pieces: a text, or a window of one that is chunked."""

    request: EmbedRequest
    #: of each piece
    tokens: Sequence[TokenizedText]
    #: of each piece, the place of its text
    texts: Sequence[int]
    #: (n,) of each text, as the result reports it
    num_tokens: tuple[int, ...]
    #: (pieces, embedding_dim) float32 once all are there; or of token output (sum of num_tokens, d) as the result
    #: has them
    vectors: NDArray[Any] | None = None
    #: pieces not encoded yet
    missing: int = 0
    #: set once a text could not be encoded; the other rows no longer matter
    failure: JobFailedError | None = None
    #: the caller's own
    tag: Any = None
    #: seconds that it has waited before
    queued_s: float = 0.0
    began_at: float = field(default_factory=time.monotonic)
    tokenize_s: float = 0.0
    #: what the micro-batches that served this job took, whoever shared them
    encode_s: float = 0.0
    #: this job's share of them, by pieces
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
    def lengths(self) -> Sequence[int]:
        """(pieces,) tokens"""
        return [text.num_tokens for text in self.tokens] if self.request.options.chunk else self.num_tokens

    def ready(self, rank: int = 0) -> ReadyJob:
        """As it waits for the encoder; `rank` of its queue, 0 the most urgent."""
        pieces: list[Piece] = list(zip(itertools.repeat(self), range(len(self.tokens))))
        return ReadyJob(pieces, self.lengths, _KINDS[self.output], rank)

    @property
    def truncated(self) -> tuple[bool, ...]:
        """(n,)"""
        if self.request.options.chunk:
            return (False,) * len(self.num_tokens)
        return tuple([text.truncated for text in self.tokens])

    def reserve(self, num_rows: int, like: NDArray[Any]) -> None:
        """Room for all rows, of the width and type of `like`. Filling cannot fail then."""
        if self.vectors is None:
            self.vectors = np.empty((num_rows, like.shape[1]), like.dtype)

    def fill(self, places: Sequence[int], rows: NDArray[np.float32]) -> None:
        """The vectors (k, embedding_dim) of k pieces."""
        self.missing -= len(places)
        if len(places) == len(self.tokens):
            self.vectors = rows
            return
        assert self.vectors is not None  # reserved before
        self.vectors[list(places)] = rows

    def fill_states(self, place: int, rows: NDArray[np.generic]) -> None:
        """The vectors (num_tokens, d) of one piece's tokens, as the result has them."""
        assert self.vectors is not None  # reserved before
        start = sum(self.num_tokens[:place])
        self.vectors[start : start + len(rows)] = rows
        self.missing -= 1

    def mean_vectors(self) -> NDArray[np.float32]:
        """(n, embedding_dim) each text's vector: the mean of its windows'."""
        assert self.vectors is not None  # whoever asks has seen that it is done
        if not self.request.options.chunk:
            return self.vectors
        with np.errstate(over="ignore"):
            return mean_of_windows(self.vectors, np.bincount(self.texts, minlength=len(self.num_tokens)).tolist())


#: One piece of one job, what a micro-batch is made of: the job and the piece's place. Plain, because there is one
#: for each text.
Piece = tuple[Work, int]
#: What the requests of one call came to, each by itself.
Tokenized = Work | JobFailedError
Finished = Embeddings | JobFailedError


class Engine:
    """Drives one encoder."""

    def __init__(
        self,
        encoder: Encoder,
        max_batch_tokens: int | None = None,
        worker_name: str = "",
        watching: Watching = nullcontext,
        observer: Observer | None = None,
    ) -> None:
        self.encoder = encoder
        # An encoder may have found on its device that less fits than was asked for.
        self.max_batch_tokens = min(max_batch_tokens or encoder.max_batch_tokens, encoder.max_batch_tokens)
        self.worker_name = worker_name
        self.log = BatchLog(self.max_batch_tokens)
        self.isolation = Isolation(encoder, self._encode, self.max_batch_tokens, watching)
        self._observer = observer or Observer()
        #: options that this encoder can serve
        self._checked: set[EmbedOptions] = set()

    def tokenize_all(self, requests: Sequence[EmbedRequest]) -> list[Tokenized]:
        """As `tokenize`, of many jobs at once: those with the same options are tokenized in one call."""
        found: list[Tokenized | None] = [None] * len(requests)
        for group in _grouped([request.options for request in requests]):
            of_group = [requests[place] for place in group]
            for place, tokenized in zip(group, self._tokenize_group(of_group), strict=True):
                found[place] = tokenized
        return [tokenized for tokenized in found if tokenized is not None]

    def tokenize(self, request: EmbedRequest) -> Work:
        """Raises JobFailedError for what this model cannot do: another model, an unknown prompt, a long text.

        What an encoder raises beyond ModelError is its job's failure too, with the code `internal`.
        """
        began_at = time.monotonic()
        try:
            [work] = self._make_works([request])
        except (JobFailedError, *ENDINGS):
            raise
        except BaseException as err:
            raise job_failure(err) from err
        work.tokenize_s = time.monotonic() - began_at
        return work

    def _tokenize_group(self, requests: Sequence[EmbedRequest]) -> Iterator[Tokenized]:
        """Requests with the same options. Where one of them fails, each is tokenized by itself."""
        began_at = time.monotonic()
        try:
            works = self._make_works(requests)
        except ENDINGS:
            raise
        except BaseException:
            for request in requests:
                try:
                    yield self.tokenize(request)
                except JobFailedError as err:
                    yield err
            return
        took_s = (time.monotonic() - began_at) / len(works)
        for work in works:
            work.tokenize_s = took_s
            yield work

    def _make_works(self, requests: Sequence[EmbedRequest]) -> list[Work]:
        """Requests with the same options."""
        options = requests[0].options
        self._check(options)
        prompt = self.encoder.resolve_prompt(options.prompt, options.prompt_name)
        if options.chunk:
            return [self._make_chunked_work(request, prompt) for request in requests]
        texts = [text for request in requests for text in request.texts]
        tokens = self.encoder.tokenize(
            texts, prompt=prompt, truncate=options.truncate, truncation_side=options.truncation_side
        )
        works: list[Work] = []
        start = 0
        for request in requests:
            end = start + len(request.texts)
            of_job = tokens[start:end]
            num_tokens = tuple([text.num_tokens for text in of_job])
            if options.output == "tokens":
                self._check_size(num_tokens, options)
            works.append(Work(request, of_job, range(len(of_job)), num_tokens, missing=len(of_job)))
            start = end
        return works

    def _make_chunked_work(self, request: EmbedRequest, prompt: str) -> Work:
        chunked = self.encoder.tokenize_windows(request.texts, prompt=prompt, overlap=request.options.chunk_overlap)
        windows = [window for text in chunked for window in text.windows]
        texts = [index for index, text in enumerate(chunked) for _ in text.windows]
        num_tokens = tuple(text.num_tokens for text in chunked)
        return Work(request, windows, texts, num_tokens, missing=len(windows))

    def _check(self, options: EmbedOptions) -> None:
        """Raises what `finish` would for these options, before anything is encoded; most jobs ask for the same."""
        if options in self._checked:
            return
        name = self.encoder.name
        if not options.is_by_model(name):
            raise JobFailedError(f"the job wants model {options.model}, this worker serves {name}", code="wrong_model")
        self._finished_nothing(options)
        if len(self._checked) == MAX_CHECKED_OPTIONS:
            self._checked.clear()
        self._checked.add(options)

    def _finished_nothing(self, options: EmbedOptions) -> NDArray[np.generic]:
        """(0, d) of the result's type."""
        width = self.encoder.token_dim if options.output == "tokens" else self.encoder.embedding_dim
        return self._postprocess(np.empty((0, width), np.float32), options)

    def _check_size(self, num_tokens: Sequence[int], options: EmbedOptions) -> None:
        """Raises JobFailedError for token output that Redis and the caller should be spared."""
        finished = self._finished_nothing(options)
        dimensions, dtype, total = finished.shape[1], finished.dtype, sum(num_tokens)
        size = total * dimensions * dtype.itemsize
        if size > MAX_TOKEN_OUTPUT_BYTES:
            raise JobFailedError(
                f"{total:,} tokens x {dimensions} {dtype} are {size:,} bytes of output; at most"
                f" {MAX_TOKEN_OUTPUT_BYTES:,} go: put fewer texts in one job, or ask for float16 or fewer dimensions",
                code="output_too_large",
            )

    def encode(self, batch: Sequence[Piece]) -> list[Work]:
        """Encodes one micro-batch, of one kind of output; returns the jobs that are done with it, or failed by it.

        A job's pieces stand together, in their order. Raises DeviceLostError: then no micro-batch can be encoded in
        this process any more, and some jobs of this one may already be done.
        """
        pieces = [piece for piece in batch if piece[0].failure is None]
        if not pieces:
            return []
        began_at = time.monotonic()
        num_tokens = sum([work.tokens[place].num_tokens for work, place in pieces])
        self.isolation.encode(pieces, num_tokens)
        took_s = time.monotonic() - began_at
        counts = Counter([work for work, _ in pieces])
        self._observer.encoded(Encoded(pieces, counts.keys(), num_tokens, began_at, took_s))
        for work, count in counts.items():
            work.encode_s += took_s
            work.busy_s += took_s * count / len(pieces)
            work.batch_texts = max(work.batch_texts, len(pieces))
            work.batch_tokens = max(work.batch_tokens, num_tokens)
        self.log.add(len(pieces), len(counts), num_tokens, took_s)
        return [work for work in counts if work.is_done]

    def finish_all(self, works: Sequence[Work]) -> list[Finished]:
        """As `finish`, of many jobs at once: vectors with the same options are finished in one call."""
        # Token output is finished already, piece by piece.
        vectors: list[Any] = [work.vectors if work.failure is None else work.failure for work in works]
        whole = [place for place, work in enumerate(works) if work.failure is None and work.output == "sentence"]
        for group in _grouped([works[place].request.options for place in whole]):
            places = [whole[member] for member in group]
            for place, of_job in zip(places, self._finish_group([works[place] for place in places]), strict=True):
                vectors[place] = of_job
        return [
            self._result(work, of_job) if isinstance(of_job, np.ndarray) else of_job
            for work, of_job in zip(works, vectors, strict=True)
        ]

    def _finish_group(self, works: Sequence[Work]) -> Iterator[NDArray[np.generic] | JobFailedError]:
        """(n, d) of each of these jobs, which have the same options. Where one fails, each is finished by itself."""
        if len(works) == 1 or len(works) * TEXTS_TO_FINISH_ALONE <= sum([len(work.num_tokens) for work in works]):
            yield from map(self._finish_one, works)
            return
        try:
            together = np.concatenate([work.mean_vectors() for work in works])
            finished = self._finish_vectors(together, works[0].request.options)
        except Exception:
            yield from map(self._finish_one, works)
            return
        start = 0
        for work in works:
            end = start + len(work.num_tokens)
            yield finished[start:end]
            start = end

    def _finish_one(self, work: Work) -> NDArray[np.generic] | JobFailedError:
        try:
            return self._finish_vectors(work.mean_vectors(), work.request.options)
        except Exception as err:
            return job_failure(err)

    def _finish_vectors(self, vectors: NDArray[np.float32], options: EmbedOptions) -> NDArray[np.generic]:
        """Raises NonFiniteError. What was finite is not where a mean or float16 is too small for it."""
        if options.chunk:
            _check_finite(vectors)
        finished = self._postprocess(vectors, options)
        if options.precision == "float16":
            _check_finite(finished)
        return finished

    def finish(self, work: Work) -> Embeddings:
        """The job's result. Raises JobFailedError if one of its texts failed."""
        [finished] = self.finish_all([work])
        if isinstance(finished, JobFailedError):
            raise finished
        return finished

    def _result(self, work: Work, vectors: NDArray[np.generic]) -> Embeddings:
        queued_s = work.queued_s
        options = work.request.options
        return Embeddings(
            vectors=vectors,
            num_tokens=work.num_tokens,
            truncated=work.truncated,
            model=self.encoder.name,
            revision=self.encoder.revision,
            worker=self.worker_name,
            timings=Timings(
                queued_s=_rounded(queued_s),
                tokenize_s=_rounded(work.tokenize_s),
                encode_s=_rounded(work.encode_s),
                total_s=_rounded(queued_s + time.monotonic() - work.began_at),
                batch_texts=work.batch_texts,
                batch_tokens=work.batch_tokens,
            ),
            output=options.output,
            calibration=self.encoder.calibration_digest if options.precision in CALIBRATED else "",
        )

    def run(self, request: EmbedRequest) -> Embeddings:
        """One request from end to end. Raises JobFailedError."""
        work = self.tokenize(request)
        ready = ReadyTexts(self.max_batch_tokens)
        ready.add([work.ready()])
        while ready and work.failure is None:
            try:
                self.encode(ready.take())
            except DeviceLostError as err:
                raise job_failure(err) from err
        return self.finish(work)

    def _postprocess(self, vectors: NDArray[np.float32], options: EmbedOptions) -> NDArray[np.generic]:
        postprocess = postprocess_states if options.output == "tokens" else self.encoder.postprocess
        with np.errstate(over="ignore"):
            return postprocess(
                vectors, normalize=options.normalize, dimensions=options.dimensions, precision=options.precision
            )

    def _encode(self, pieces: Sequence[Piece], encoder: Encoder) -> None:
        """Fills the jobs' rows, all or none. Raises NonFiniteError for a row that is not finite."""
        tokens = [work.tokens[place] for work, place in pieces]
        if pieces[0][0].output == "tokens":
            self._encode_states(pieces, encoder.encode_states(tokens))
            return
        vectors = encoder.encode_tokens(tokens)
        _check_finite(vectors)
        runs = [(work, [place for _, place in run]) for work, run in itertools.groupby(pieces, key=itemgetter(0))]
        for work, places in runs:
            if len(places) < len(work.tokens):
                work.reserve(len(work.tokens), vectors)
        start = 0
        for work, places in runs:
            end = start + len(places)
            work.fill(places, vectors[start:end])
            start = end

    def _encode_states(self, pieces: Sequence[Piece], all_states: Sequence[NDArray[np.float32]]) -> None:
        finished = [
            self._postprocess(states, work.request.options)
            for (work, _), states in zip(pieces, all_states, strict=True)
        ]
        for index, ((work, _), states) in enumerate(zip(pieces, finished, strict=True)):
            _check_finite(states, index)
            work.reserve(sum(work.num_tokens), states)
        for (work, place), states in zip(pieces, finished, strict=True):
            work.fill_states(place, states)


def _grouped(options: Sequence[EmbedOptions]) -> Iterator[list[int]]:
    """The places of equal options."""
    groups: dict[EmbedOptions, list[int]] = {}
    for place, option in enumerate(options):
        groups.setdefault(option, []).append(place)
    return iter(groups.values())


def _rounded(seconds: float) -> float:
    """To hundredths of milliseconds: a clock's further digits would only be bytes in every result."""
    return round(seconds, 5)


def _check_finite(rows: NDArray[np.generic], text: int | None = None) -> None:
    """Raises NonFiniteError of the first row with NaN or Inf; of `text` where all rows are one's."""
    # One sum shows it, unless that overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum()):
            return
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise NonFiniteError("the model's output is not finite", int(np.argmin(finite)) if text is None else text)
