"""The sentence encoder: a model folder loaded once, texts in, vectors out.

Joins tokenizer, encoder and pooling; knows no queue and no download. `Encoder` is its seam to the worker, `encode`
the whole way for everybody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedq.model import device as devices
from embedq.model.backend import choose_backend, dtype_name, resolve_dtype
from embedq.model.budget import Footprint, tokens_that_fit
from embedq.model.config import MPNetConfig, read_config
from embedq.model.dense import Dense
from embedq.model.encoder import Precision, TokenizedText, TruncationSide
from embedq.model.errors import ModelFormatError, ModelOptionError, NonFiniteError
from embedq.model.modules import Modules, read_modules
from embedq.model.mpnet import MPNet
from embedq.model.packing import pack
from embedq.model.pooling import pool
from embedq.model.precision import postprocess
from embedq.model.runtime import Read, runtime_for
from embedq.model.tokenizer import Tokenizer
from embedq.model.warm_up import proven_budget
from embedq.model.weights import Checkpoint

if TYPE_CHECKING:
    from embedq.model.progress import Progress

#: Hex digits of the weights' SHA-256 in a revision.
REVISION_DIGITS = 12
#: Micro-batches that may be under way at once, so that the host prepares the next while the device computes.
MAX_PENDING = 4


class SentenceEncoder:
    """Fulfils `Encoder`. May be called from several threads; on one device they share its speed.

    Attributes: path (the model folder), name, embedding_dim (after Dense), max_seq_length (tokens, special ones
    included), device, dtype, backend, default_normalize, prompts (name to text), max_batch_tokens.
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
    ) -> None:
        """From a folder; most callers want `load`."""
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ModelOptionError(f"max_batch_tokens must be above 0, not {max_batch_tokens}")
        self.path = path
        self.name = name
        self.device = device
        self._runtime = runtime_for(device, allow_tf32=allow_tf32)
        modules = read_modules(path)
        config = read_config(modules.transformer)
        self._checkpoint = Checkpoint(modules.transformer)
        self.dtype = resolve_dtype(dtype, device, is_quantized=self._checkpoint.is_quantized)
        self.backend = choose_backend(device, self.dtype, config, kernels=kernels, attention=attention)
        self._resolved_revision = revision
        self._set_up_texts(modules, config)
        self._set_up_vectors(modules, config)
        self._model = MPNet(config, self._checkpoint, self.backend, self._runtime)
        self.max_batch_tokens = max_batch_tokens or self._tokens_for_device()

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
        Raises ModelSourceError, ModelFormatError, WeightsError, DeviceError.
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
        )
        if warm_up if warm_up is not None else chosen_device.type == "cuda":
            encoder.warm_up()
        return encoder

    def _set_up_texts(self, modules: Modules, config: MPNetConfig) -> None:
        self.prompts = modules.prompts
        self._default_prompt_name = modules.default_prompt_name
        self.max_seq_length = min(modules.max_seq_length or config.max_length, config.max_length)
        self._tokenizer = Tokenizer(modules.transformer, self.max_seq_length, lowercase=modules.lowercase)
        if self._tokenizer.max_id >= config.vocab_size:
            raise ModelFormatError(
                f"{modules.transformer}: tokenizer.json has token id {self._tokenizer.max_id}, config.json only"
                f" {config.vocab_size} (vocab_size)"
            )

    def _set_up_vectors(self, modules: Modules, config: MPNetConfig) -> None:
        self.default_normalize = modules.normalize
        self._pooling_modes = modules.pooling_modes
        if modules.pooling_dim not in (None, config.hidden_size):
            raise ModelFormatError(
                f"{self.path}: Pooling is for {modules.pooling_dim} dimensions, the encoder has {config.hidden_size}"
            )
        self.embedding_dim = len(modules.pooling_modes) * config.hidden_size
        self._dense: list[Dense] = []
        for dense in modules.dense:
            if dense.in_features != self.embedding_dim:
                raise ModelFormatError(
                    f"{dense.folder}: Dense takes {dense.in_features} dimensions and is given {self.embedding_dim}"
                )
            self._dense.append(Dense(dense, self.device))
            self.embedding_dim = dense.out_features

    def _tokens_for_device(self) -> int:
        most = devices.BATCH_TOKENS[self.device.type]
        with self._runtime.scope():
            memory = self._runtime.memory()
        if memory is None:
            return most
        config = self._model.config
        pooled_dim = len(self._pooling_modes) * config.hidden_size
        max_scores = devices.MAX_SCORES[self.device.type]
        footprint = Footprint(config, self._element_bytes(), max_scores, self.max_seq_length, pooled_dim)
        return tokens_that_fit(footprint, memory.free, most)

    def _element_bytes(self) -> int:
        """Of the widest value between two products; sums of int8 are int32."""
        return 4 if self.dtype == torch.int8 else self.backend.activation_dtype.itemsize

    def warm_up(self) -> None:
        """Lowers `max_batch_tokens` to what is proven to fit the device. Raises DeviceError if no long text does."""
        with torch.inference_mode():
            self.max_batch_tokens = proven_budget(
                self._encode_packed, self._runtime, longest=self.max_seq_length, num_tokens=self.max_batch_tokens
            )

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or the first 12 hex digits of the weights' SHA-256, computed on first use."""
        return self._resolved_revision or self._checkpoint.sha256()[:REVISION_DIGITS]

    @property
    def placement(self) -> str:
        """Such as `cpu float32`."""
        return f"{self.device} {dtype_name(self.dtype)}"

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

    def encode_tokens(self, batch: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """(n, embedding_dim) float32 in the batch's order, before normalisation.

        Computed in micro-batches of at most `max_batch_tokens`, so memory does not grow with the batch.
        Raises NonFiniteError, so that no vector has NaN or Inf.
        """
        return self._encode_tokens(batch, _report_nothing)

    def _encode_tokens(self, batch: Sequence[TokenizedText], report: Callable[[int], None]) -> NDArray[np.float32]:
        vectors = np.empty((len(batch), self.embedding_dim), dtype=np.float32)
        if not batch:
            return vectors
        lengths = np.array([text.num_tokens for text in batch])
        self._check_ids(batch, lengths)
        pending: deque[tuple[NDArray[np.int64], Read]] = deque()
        with torch.inference_mode(), self._runtime.scope():
            for rows in self._cut(np.argsort(-lengths, kind="stable"), lengths):
                pending.append((rows, self._runtime.download(self._encode_packed([batch[i].ids for i in rows]))))
                if len(pending) == MAX_PENDING:
                    self._collect(*pending.popleft(), batch, vectors)
                report(len(rows))
            while pending:
                self._collect(*pending.popleft(), batch, vectors)
        return vectors

    def _collect(
        self, rows: NDArray[np.int64], read: Read, batch: Sequence[TokenizedText], vectors: NDArray[np.float32]
    ) -> None:
        part = read()
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            index = int(rows[~finite].min())
            raise NonFiniteError(self._why_not_finite(batch[index].ids), index)
        vectors[rows] = part

    def _why_not_finite(self, ids: NDArray[np.int32]) -> str:
        """Looks for the first layer with NaN or Inf, by encoding the text once more alone."""
        hint = (
            "; float16 ends at 65504: use bfloat16 or float32" if self.backend.activation_dtype == torch.float16 else ""
        )
        return f"the model's output is not finite: NaN or Inf {self._where_not_finite(ids)}{hint}"

    def _where_not_finite(self, ids: NDArray[np.int32]) -> str:
        packed = pack([ids])
        for index, hidden in enumerate(self._model.hidden_states(packed)):
            if not hidden.isfinite().all():
                return f"first in layer {index} of {len(self._model.layers)}" if index else "already in the embeddings"
        if not self._encode_packed([ids]).isfinite().all():
            return "behind the last layer, in Pooling or Dense"
        return "in this micro-batch, yet not when the text is encoded alone"

    def _check_ids(self, batch: Sequence[TokenizedText], lengths: NDArray[np.int64]) -> None:
        """An id out of range reads foreign memory on a CPU and kills a GPU's context."""
        config = self._model.config
        if lengths.min() < 1 or lengths.max() > config.max_length:
            index = int(np.argmax((lengths < 1) | (lengths > config.max_length)))
            raise ModelOptionError(
                f"text {index} has {lengths[index]} tokens: this model takes 1 to {config.max_length}"
            )
        ids = np.concatenate([text.ids for text in batch])
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ModelOptionError(f"token ids must be vectors of whole numbers, not {ids.dtype} of {ids.ndim} axes")
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ModelOptionError(f"token ids must be 0 to {config.vocab_size - 1}, not {ids.min()} to {ids.max()}")

    def _cut(self, order: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Slices of `order` of at most `max_batch_tokens`, at least one text each."""
        start = num_tokens = 0
        for end, length in enumerate(lengths[order].tolist()):
            if num_tokens + length > self.max_batch_tokens and end > start:
                yield order[start:end]
                start, num_tokens = end, 0
            num_tokens += length
        yield order[start:]

    def _encode_packed(self, sequences: Sequence[NDArray[np.int32]]) -> Tensor:
        """(n, embedding_dim) on the device, for sequences the longest first."""
        placed = self._model.place(pack(sequences))
        hidden, lengths = devices.for_segments(self._model.run(placed), placed.lengths)
        vectors = pool(hidden, lengths, self._pooling_modes).to(self.device)
        for dense in self._dense:
            vectors = dense(vectors)
        return vectors

    def postprocess(
        self,
        vectors: NDArray[np.float32],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
    ) -> NDArray[np.generic]:
        normalize = self.default_normalize if normalize is None else normalize
        return postprocess(vectors, normalize=normalize, dimensions=dimensions, precision=precision)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
        truncate: bool = True,
        truncation_side: TruncationSide = "right",
        show_progress: bool = False,
    ) -> NDArray[np.generic]:
        """(n, d) in the order of `texts`; a single str gives (1, d).

        normalize: None means as the model says. dimensions: cut, then normalise. precision: float32, float16,
        binary, ubinary. Raises ModelOptionError, NonFiniteError, TextTooLongError if `truncate` is false.
        """
        batch = self.tokenize(
            [texts] if isinstance(texts, str) else texts,
            prompt=self.resolve_prompt(prompt, prompt_name),
            truncate=truncate,
            truncation_side=truncation_side,
        )
        with _progress_bar(len(batch)) if show_progress else nullcontext(_report_nothing) as report:
            vectors = self._encode_tokens(batch, report)
        return self.postprocess(vectors, normalize=normalize, dimensions=dimensions, precision=precision)


def _report_nothing(_num_texts: int) -> None: ...


@contextmanager
def _progress_bar(num_texts: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task("encoding", total=num_texts)
        yield lambda done: bar.advance(task, done)
