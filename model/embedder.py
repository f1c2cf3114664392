"""From token ids to raw vectors: micro-batches through the network, the pooling and what follows it.

Knows tensors and the device's runtime; no text, no prompt and no file. Nothing here waits for the device but the
last copy of a micro-batch, and that one only when the next ones are under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedq.model import device as devices
from embedq.model.budget import Footprint, tokens_that_fit
from embedq.model.dense import Dense
from embedq.model.device_errors import device_errors
from embedq.model.encoder import TokenizedText
from embedq.model.errors import ModelOptionError, NonFiniteError
from embedq.model.mpnet import MPNet
from embedq.model.packing import pack
from embedq.model.pooling import pool
from embedq.model.runtime import Read, Runtime
from embedq.model.warm_up import proven_budget

#: Micro-batches that may be under way at once, so that the host prepares the next while the device computes.
MAX_PENDING = 4

#: Told how many more texts are done.
Report = Callable[[int], None]
Sequences = Sequence[NDArray[np.int32]]


def report_nothing(_num_texts: int) -> None: ...


class Embedder:
    """May be called from several threads."""

    def __init__(
        self,
        model: MPNet,
        runtime: Runtime,
        pooling_modes: Sequence[str],
        dense: Sequence[Dense],
        *,
        longest: int,
        max_batch_tokens: int | None = None,
    ) -> None:
        """longest: tokens of the longest text. max_batch_tokens: None for what suits the device and its memory."""
        self.model = model
        self.runtime = runtime
        self._pooling_modes = pooling_modes
        self._dense = dense
        self._longest = longest
        self._pooled_dim = len(pooling_modes) * model.config.hidden_size
        self._vector_dim = dense[-1].out_features if dense else self._pooled_dim
        self.max_batch_tokens = max_batch_tokens or self._tokens_for_device()

    def _tokens_for_device(self) -> int:
        backend = self.model.backend
        most = devices.BATCH_TOKENS[backend.device.type]
        with self.runtime.scope():
            memory = self.runtime.memory()
        if memory is None:
            return most
        # Sums of int8 products are int32.
        element_bytes = 4 if backend.dtype == torch.int8 else backend.activation_dtype.itemsize
        max_scores = devices.MAX_SCORES[backend.device.type]
        footprint = Footprint(self.model.config, element_bytes, max_scores, self._longest, self._pooled_dim)
        return tokens_that_fit(footprint, memory.free, most)

    def warm_up(self) -> None:
        """Lowers `max_batch_tokens` to what is proven to fit the device.

        Raises DeviceError if no long text does, DeviceLostError.
        """
        with device_errors(self.runtime), torch.inference_mode():
            self.max_batch_tokens = proven_budget(
                self.encode_packed, self.runtime, longest=self._longest, num_tokens=self.max_batch_tokens
            )

    def release_memory(self) -> None:
        """Gives the device what torch holds without using it. Raises DeviceLostError."""
        with device_errors(self.runtime), self.runtime.scope():
            self.runtime.release_cache()

    def device_memory(self) -> dict[str, int]:
        """Bytes allocated, reserved and in total; empty where the device shares the host's memory."""
        with self.runtime.scope():
            memory = self.runtime.memory()
        if memory is None:
            return {}
        return {"allocated": memory.allocated, "reserved": memory.reserved, "total": memory.total}

    def padding_ratio(self, batch: Sequence[TokenizedText]) -> float:
        """Of the pairs of query and key that attention computes for a batch, the share with padding; 0 to below 1."""
        lengths = _lengths(batch)
        if not lengths.size:
            return 0.0
        slices = self._cut(np.argsort(-lengths, kind="stable"), lengths)
        num_cells = sum([self.model.num_attention_cells(lengths[rows].tolist()) for rows in slices])
        return 1.0 - int((lengths * lengths).sum()) / num_cells

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with device_errors(self.runtime), torch.inference_mode(), self.runtime.scope():
            yield

    def vectors(
        self, batch: Sequence[TokenizedText], report: Report = report_nothing, places: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """(n, d) float32 in the batch's order, before normalisation.

        Raises ModelOptionError, NonFiniteError, OutOfMemoryError, DeviceLostError.
        places: of each, its text's place in the caller's own list, for errors.
        """
        vectors = np.empty((len(batch), self._vector_dim), dtype=np.float32)

        def encode(rows: NDArray[np.int64]) -> Tensor:
            sequences, skipped = [batch[row].ids for row in rows], [batch[row].skipped for row in rows]
            return self.encode_packed(sequences, skipped) if any(skipped) else self.encode_packed(sequences)

        with self._computing():
            for rows, part in self._run(batch, encode, report):
                finite = np.isfinite(part).all(axis=1)
                if not finite.all():
                    self._refuse(batch, int(rows[~finite].min()), places)
                vectors[rows] = part
        return vectors

    def states(
        self, batch: Sequence[TokenizedText], report: Report = report_nothing, places: Sequence[int] | None = None
    ) -> list[NDArray[np.float32]]:
        """The last hidden states of each text, (num_tokens, hidden) float32. Raises as `vectors`."""
        states: list[NDArray[np.float32]] = [np.empty((0, self.model.config.hidden_size), np.float32)] * len(batch)

        def encode(rows: NDArray[np.int64]) -> Tensor:
            return self.model(pack([batch[row].ids for row in rows])).float()

        lengths = _lengths(batch)
        with self._computing():
            for rows, part in self._run(batch, encode, report):
                for row, of_text in zip(rows, np.split(part, np.cumsum(lengths[rows])[:-1]), strict=True):
                    if not np.isfinite(of_text).all():
                        self._refuse(batch, int(row), places)
                    # A copy each: a view would keep the whole micro-batch alive.
                    states[row] = of_text.copy()
        return states

    def _run(
        self, batch: Sequence[TokenizedText], encode: Callable[[NDArray[np.int64]], Tensor], report: Report
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Which texts, and what `encode` gave for them, micro-batch by micro-batch, the longest texts first.

        The caller holds inference mode and the runtime's scope: a generator that is left half-way would keep them on.
        """
        if not batch:
            return
        lengths = _lengths(batch)
        self._check_ids(batch, lengths)
        pending: deque[tuple[NDArray[np.int64], Read]] = deque()
        for rows in self._cut(np.argsort(-lengths, kind="stable"), lengths):
            pending.append((rows, self.runtime.download(encode(rows))))
            if len(pending) == MAX_PENDING:
                done, read = pending.popleft()
                yield done, read()
            report(len(rows))
        while pending:
            done, read = pending.popleft()
            yield done, read()

    def _check_ids(self, batch: Sequence[TokenizedText], lengths: NDArray[np.int64]) -> None:
        """An id out of range reads foreign memory on a CPU and kills a GPU's context."""
        config = self.model.config
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

    def encode_packed(self, sequences: Sequences, skipped: list[int] | None = None) -> Tensor:
        """(n, d) on the device, for sequences the longest first; `skipped` tokens of each are not pooled."""
        placed = self.model.place(pack(sequences))
        hidden, lengths = devices.for_segments(self.model.run(placed), placed.lengths)
        left_out = torch.tensor(skipped, device=lengths.device) if skipped else None
        vectors = pool(hidden, lengths, self._pooling_modes, left_out).to(self.model.backend.device)
        for dense in self._dense:
            vectors = dense(vectors)
        return vectors

    def _refuse(self, batch: Sequence[TokenizedText], index: int, places: Sequence[int] | None) -> None:
        """Raises NonFiniteError, naming the first layer with NaN or Inf: the text is encoded once more alone."""
        is_half = self.model.backend.activation_dtype == torch.float16
        hint = "; float16 ends at 65504: use bfloat16 or float32" if is_half else ""
        where = self._where_not_finite(batch[index].ids)
        place = index if places is None else places[index]
        raise NonFiniteError(f"the model's output is not finite: NaN or Inf {where}{hint}", place)

    def _where_not_finite(self, ids: NDArray[np.int32]) -> str:
        num_layers = self.model.config.num_hidden_layers
        for index, hidden in enumerate(self.model.hidden_states(pack([ids]))):
            if not hidden.isfinite().all():
                return f"first in layer {index} of {num_layers}" if index else "already in the embeddings"
        if not self.encode_packed([ids]).isfinite().all():
            return "behind the last layer, in Pooling or Dense"
        return "in this micro-batch, yet not when the text is encoded alone"


def _lengths(batch: Sequence[TokenizedText]) -> NDArray[np.int64]:
    return np.array([text.num_tokens for text in batch])
