"""The sentence encoder: a model folder loaded once, texts in, vectors out.

Joins tokenizer, encoder and pooling; knows no queue and no download. `Encoder` is its seam to the worker, `encode`
the whole way for everybody else.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, get_args, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from embedq.model import device as devices
from embedq.model.backend import choose_backend, dtype_name, resolve_dtype
from embedq.model.calibration import Calibration, own_calibration, shipped_calibration
from embedq.model.config import MPNetConfig, read_config
from embedq.model.dense import Dense
from embedq.model.device_errors import device_errors
from embedq.model.embedder import Embedder, report_nothing
from embedq.model.encoder import ChunkedText, Output, Precision, TokenizedText, TruncationSide
from embedq.model.errors import DeviceLostError, ModelFormatError, ModelOptionError
from embedq.model.modules import Modules, read_modules
from embedq.model.mpnet import MPNet
from embedq.model.precision import Ranges, check_ranges, postprocess, postprocess_states
from embedq.model.runtime import Runtime, runtime_for
from embedq.model.similarity import similarity
from embedq.model.slices import slices_of, stack
from embedq.model.tokenizer import CHARS_PER_TOKEN, Tokenizer
from embedq.model.weights import Checkpoint
from embedq.model.windows import mean_of_windows

if TYPE_CHECKING:
    from embedq.model.progress import Progress

#: Hex digits of the weights' SHA-256 in a revision.
REVISION_DIGITS = 12

log = logging.getLogger(__name__)


class EncodeOptions(TypedDict, total=False):
    """What `encode` takes beside the texts and `output`; explained there."""

    prompt: str | None
    prompt_name: str | None
    normalize: bool | None
    dimensions: int | None
    precision: Precision
    ranges: ArrayLike | None
    truncate: bool
    truncation_side: TruncationSide
    chunk: bool
    chunk_overlap: int | None
    show_progress: bool


class SentenceEncoder:
    """Fulfils `Encoder`. May be called from several threads; on one device they share its speed.

    Attributes: path (the model folder), name, embedding_dim (after Dense), token_dim (before pooling),
    max_seq_length (tokens, special ones included), device, dtype, backend, default_normalize, prompts (name to text),
    similarity_fn_name (cosine, dot, euclidean or manhattan), max_batch_tokens.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        revision: str | None,
        device: torch.device,
        dtype: str = "auto",
        attention: str = "auto",
        kernels: str = "auto",
        max_batch_tokens: int | None = None,
        allow_tf32: bool = False,
        calibration: Path | None = None,
    ) -> None:
        """From a folder; most callers want `load`."""
        if max_batch_tokens is not None:
            _check_budget(max_batch_tokens)
        self.path = path
        self.name = name
        self.device = device
        self._own_calibration = Calibration.read(calibration) if calibration else own_calibration(path)
        modules = read_modules(path)
        self._config = config = read_config(modules.transformer)
        self._checkpoint = Checkpoint(modules.transformer)
        self._resolved_revision = revision
        self.dtype = resolve_dtype(dtype, device, is_quantized=self._checkpoint.is_quantized)
        self.backend = choose_backend(device, self.dtype, config, kernels=kernels, attention=attention)
        self._set_up_texts(modules, config)
        self._set_up_vectors(modules, config)
        self._pooling_modes = modules.pooling_modes
        self._dense = [Dense(dense, device) for dense in modules.dense]
        runtime = runtime_for(device, allow_tf32=allow_tf32)
        self._embedder = self._make_embedder(
            MPNet(config, self._checkpoint, self.backend, runtime), runtime, max_batch_tokens
        )

    def _make_embedder(self, model: MPNet, runtime: Runtime, max_batch_tokens: int | None) -> Embedder:
        return Embedder(
            model,
            runtime,
            self._pooling_modes,
            self._dense,
            longest=self.max_seq_length,
            max_batch_tokens=max_batch_tokens,
        )

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        attention: str = "auto",
        kernels: str = "auto",
        max_batch_tokens: int | None = None,
        warm_up: bool | None = None,
        allow_tf32: bool = False,
        calibration: str | Path | None = None,
        progress: Progress | None = None,
    ) -> SentenceEncoder:
        """From a folder or by name, fetched if needed.

        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`. dtype: `float32`, `float16`, `bfloat16`, `int8` (quantized
        weights, and tokens as they come), or `auto`: the fastest that keeps the meaning, on a CPU float32 or, where it
        is faster, bfloat16. revision: of a model on the hub. attention: `auto`, `bmm`, `sdpa`, `native`. kernels:
        `auto`, `native` (this package's own, for x86 CPUs with AVX-512), `torch`.
        max_batch_tokens: tokens encoded at once (None: as suits the device and its free memory). warm_up: try the
        largest micro-batches now (None: on cuda). allow_tf32: on cuda, compute float32 products with 10 bits of
        mantissa.
        calibration: file of ranges for int8 and uint8 vectors (None: the model folder's, else what ships).
        Raises ModelSourceError, ModelFormatError, WeightsError, ModelOptionError, DeviceError.
        """
        from embedq.model.sources import resolve_model

        chosen_device = devices.resolve_device(device)
        resolved = resolve_model(str(model), revision=revision, progress=progress)
        encoder = cls(
            resolved.path,
            name=resolved.name,
            revision=resolved.revision,
            device=chosen_device,
            dtype=dtype,
            attention=attention,
            kernels=kernels,
            max_batch_tokens=max_batch_tokens,
            allow_tf32=allow_tf32,
            calibration=None if calibration is None else Path(calibration),
        )
        if warm_up if warm_up is not None else chosen_device.type == "cuda":
            encoder.warm_up()
        return encoder

    def _set_up_texts(self, modules: Modules, config: MPNetConfig) -> None:
        self.prompts = modules.prompts
        self._default_prompt_name = modules.default_prompt_name
        self.max_seq_length = min(modules.max_seq_length or config.max_length, config.max_length)
        self._tokenizer = Tokenizer(
            modules.transformer,
            self.max_seq_length,
            lowercase=modules.lowercase,
            pooled_prompt=modules.pooled_prompt,
        )
        if self._tokenizer.max_id >= config.vocab_size:
            raise ModelFormatError(
                f"{modules.transformer}: tokenizer.json has token id {self._tokenizer.max_id}, config.json only"
                f" {config.vocab_size} (vocab_size)"
            )

    def _set_up_vectors(self, modules: Modules, config: MPNetConfig) -> None:
        self.default_normalize = modules.normalize
        self.similarity_fn_name = modules.similarity
        self.token_dim = config.hidden_size
        if modules.pooling_dim not in (None, config.hidden_size):
            raise ModelFormatError(
                f"{self.path}: Pooling is for {modules.pooling_dim} dimensions, the encoder has {config.hidden_size}"
            )
        self.embedding_dim = len(modules.pooling_modes) * config.hidden_size
        for dense in modules.dense:
            if dense.in_features != self.embedding_dim:
                raise ModelFormatError(
                    f"{dense.folder}: Dense takes {dense.in_features} dimensions and is given {self.embedding_dim}"
                )
            self.embedding_dim = dense.out_features
        if self._own_calibration and (found := max(self._own_calibration.dimensions)) != self.embedding_dim:
            raise ModelFormatError(
                f"the calibration is for {found} dimensions, {self.path} has {self.embedding_dim}: delete it, or"
                " calibrate this model"
            )

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or the first 12 hex digits of the weights' SHA-256, computed on first use."""
        return self._resolved_revision or self._checkpoint.sha256()[:REVISION_DIGITS]

    @property
    def placement(self) -> str:
        """Such as `cpu float32`."""
        return f"{self.device} {dtype_name(self.dtype)}"

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of a micro-batch; may be set."""
        return self._embedder.max_batch_tokens

    @max_batch_tokens.setter
    def max_batch_tokens(self, num_tokens: int) -> None:
        _check_budget(num_tokens)
        self._embedder.max_batch_tokens = num_tokens

    def warm_up(self) -> None:
        """Lowers `max_batch_tokens` to what is proven to fit the device.

        Raises DeviceError if no long text does, DeviceLostError.
        """
        self._embedder.warm_up()

    @cached_property
    def calibration(self) -> Calibration | None:
        """The ranges of int8 and uint8 vectors: the file given, the model folder's own, or what ships for its weights.

        None if there are none; `embedq model calibrate` makes them.
        """
        return self._own_calibration or shipped_calibration(self.name, self.revision)

    @property
    def calibration_digest(self) -> str:
        return self.calibration.digest if self.calibration else ""

    def resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            return prompt
        if prompt_name is None:
            return self.prompts[self._default_prompt_name] if self._default_prompt_name else ""
        if prompt_name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise ModelOptionError(f"{self.name} has no prompt named {prompt_name!r}; it has {known}")
        return self.prompts[prompt_name]

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
    ) -> list[TokenizedText]:
        """Raises TextTooLongError, and ModelOptionError for what is no valid Unicode string."""
        return self._tokenizer(texts, prompt=prompt, truncate=truncate, truncation_side=truncation_side)

    def tokenize_windows(
        self, texts: Sequence[str], *, prompt: str = "", overlap: int | None = None
    ) -> list[ChunkedText]:
        return self._tokenizer.windows(texts, prompt=prompt, overlap=overlap)

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """(n, embedding_dim) float32 in the batch's order, before normalisation.

        Computed in micro-batches of at most `max_batch_tokens`, so memory does not grow with the batch.
        Raises NonFiniteError, so that no vector has NaN or Inf; OutOfMemoryError, DeviceLostError.
        """
        return self._embedder.vectors(batch)

    def encode_states(self, batch: Sequence[TokenizedText]) -> list[NDArray[np.float32]]:
        """The last hidden state of every token: a (num_tokens, token_dim) float32 for each text, in order.

        Raises as `encode_tokens`.
        """
        return self._embedder.states(batch)

    def release_memory(self) -> None:
        """Gives the device what torch holds without using it. Raises DeviceLostError."""
        self._embedder.release_memory()

    def device_memory(self) -> dict[str, int]:
        return self._embedder.device_memory()

    def padding_ratio(self, batch: Sequence[TokenizedText]) -> float:
        return self._embedder.padding_ratio(batch)

    def in_float32(self) -> SentenceEncoder | None:
        """The same model in float32, loaded on first use and kept: from then on a GPU holds its weights twice.

        None if this one is, or if that could not be loaded, which is not tried again. Raises DeviceLostError.
        """
        return self._float32_form

    @cached_property
    def _float32_form(self) -> SentenceEncoder | None:
        if self.dtype == torch.float32:
            return None
        try:
            with device_errors(self._embedder.runtime):
                return self._load_in_float32()
        except DeviceLostError:
            raise
        except Exception as err:
            log.warning("%s could not be loaded in float32 as well: %s", self.name, type(err).__name__)
            log.debug("why not", exc_info=err)
        # Not before the handler has ended: until then the error's traceback holds the tensors.
        self.release_memory()
        return None

    def _load_in_float32(self) -> SentenceEncoder:
        """By torch's own operators, so that it shares no kernel with what failed."""
        encoder = copy.copy(self)
        encoder.dtype = torch.float32
        encoder.backend = choose_backend(self.device, torch.float32, self._config, kernels="torch")
        runtime = runtime_for(self.device)
        # A GPU says when its memory is out; the host's system may end the process, so there the weights stay in the
        # file's pages, which it can drop.
        keep_layers = self.device.type == "cuda"
        with runtime.scope():
            model = MPNet(self._config, self._checkpoint, encoder.backend, runtime, keep_layers=keep_layers)
        encoder._embedder = self._make_embedder(model, runtime, self.max_batch_tokens)
        return encoder

    def postprocess(
        self,
        vectors: NDArray[np.float32],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
        ranges: ArrayLike | None = None,
    ) -> NDArray[np.generic]:
        """As `Encoder.postprocess`. ranges: (2, d), for int8 and uint8 in place of the model's own."""
        normalize = self.default_normalize if normalize is None else normalize

        def find_ranges(count: int) -> Ranges:
            return self._ranges(count, normalize) if ranges is None else check_ranges(ranges, count)

        return postprocess(
            vectors, normalize=normalize, dimensions=dimensions, precision=precision, find_ranges=find_ranges
        )

    def _ranges(self, dimensions: int, normalized: bool) -> Ranges:
        if self.calibration is None:
            raise ModelOptionError(
                f"int8 and uint8 vectors need ranges, and {self.name} has none: write them with embedq model calibrate"
                " and load them with calibration=FILE (--calibration FILE), or give ranges"
            )
        return self.calibration.ranges_for(dimensions, normalized=normalized)

    @overload
    def encode(
        self, texts: str | Sequence[str], *, output: Literal["sentence"] = "sentence", **options: Unpack[EncodeOptions]
    ) -> NDArray[np.generic]: ...

    @overload
    def encode(
        self, texts: str | Sequence[str], *, output: Literal["tokens"], **options: Unpack[EncodeOptions]
    ) -> list[NDArray[np.generic]]: ...

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        output: Output = "sentence",
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
        ranges: ArrayLike | None = None,
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
        chunk: bool = False,
        chunk_overlap: int | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.generic] | list[NDArray[np.generic]]:
        """(n, d) in the order of `texts`; a single str gives (1, d).

        output: `tokens` gives a list of (num_tokens, d) instead, the last hidden state of every token, special ones
        included; float32 or float16, normalised only if asked, never chunked.
        normalize: None means as the model says. dimensions: cut, then normalise. precision: float32, float16, int8,
        uint8, binary, ubinary; int8 and uint8 clamp what is out of their ranges. ranges: (2, d) float32 for them, in
        place of the calibration's. chunk: a text longer than the model becomes overlapping windows, and its
        vector their mean; `chunk_overlap` is how many tokens they share at least (None: an eighth of a window).
        Beyond the result, memory does not grow with the number of texts.
        Raises ModelOptionError, NonFiniteError, OutOfMemoryError, DeviceLostError; TextTooLongError if `truncate` is
        false, or for a text of more than 1,024 windows.
        """
        texts = [texts] if isinstance(texts, str) else texts
        _check_output(output, chunk, chunk_overlap, ranges)
        prompt = self.resolve_prompt(prompt, prompt_name)
        tokenize = partial(self._tokenizer, prompt=prompt, truncate=truncate, truncation_side=truncation_side)
        windows = partial(self._tokenizer.windows, prompt=prompt, overlap=chunk_overlap)
        finish_states = partial(postprocess_states, normalize=normalize, dimensions=dimensions, precision=precision)
        finish = partial(
            self.postprocess, normalize=normalize, dimensions=dimensions, precision=precision, ranges=ranges
        )
        # Asked of an empty array first, so that what cannot be given is refused before anything is encoded.
        if output == "tokens":
            finish_states(np.empty((0, self.token_dim), np.float32))
        else:
            finish(np.empty((0, self.embedding_dim), np.float32))
        places = range(len(texts))
        with _progress_bar(len(texts)) if show_progress else nullcontext(report_nothing) as report:
            slices = slices_of(texts, None if chunk else CHARS_PER_TOKEN * self.max_seq_length)
            if output == "tokens":
                return [
                    finish_states(states)
                    for first, part in slices
                    for states in self._embedder.states(tokenize(part, first=first), report, places[first:])
                ]
            vectors = (
                self._encode_windows(windows(part, first=first), report, places[first:])
                if chunk
                else self._embedder.vectors(tokenize(part, first=first), report, places[first:])
                for first, part in slices
            )
            return stack((finish(part) for part in vectors), len(texts))

    def _encode_windows(
        self, texts: Sequence[ChunkedText], report: Callable[[int], None], places: Sequence[int]
    ) -> NDArray[np.float32]:
        """(n, embedding_dim) float32 the mean of each text's windows."""
        windows = [window for text in texts for window in text.windows]
        places = [place for text, place in zip(texts, places, strict=False) for _ in text.windows]
        vectors = self._embedder.vectors(windows, places=places)
        report(len(texts))
        return mean_of_windows(vectors, [len(text.windows) for text in texts])

    def similarity(self, a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
        """(n, m) float32 by the model's own `similarity_fn_name`, of vectors (n, d) and (m, d); (d,) is one vector.

        Raises ModelOptionError for shapes that do not fit.
        """
        return similarity(a, b, self.similarity_fn_name)


def _check_budget(max_batch_tokens: int) -> None:
    if isinstance(max_batch_tokens, bool) or not isinstance(max_batch_tokens, int) or max_batch_tokens < 1:
        raise ModelOptionError(f"max_batch_tokens must be a whole number above 0, not {max_batch_tokens!r}")


def _check_output(output: Output, chunk: bool, chunk_overlap: int | None, ranges: ArrayLike | None) -> None:
    """What contradicts itself whatever the model."""
    if output not in get_args(Output):
        raise ModelOptionError(f"output must be {' or '.join(get_args(Output))}, not {output!r}")
    if chunk_overlap is not None and not chunk:
        raise ModelOptionError("chunk_overlap needs chunk=True")
    if output == "tokens" and (chunk or ranges is not None):
        raise ModelOptionError("token output is neither chunked nor quantized: a token has one vector, in one window")


@contextmanager
def _progress_bar(num_texts: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task("encoding", total=num_texts)
        yield lambda done: bar.advance(task, done)
