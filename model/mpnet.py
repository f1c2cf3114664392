"""MPNet's encoder on packed tokens: from token ids to one vector a token.

MPNet: Masked and Permuted Pre-training for Language Understanding (arXiv 2004.09297), as in transformers'
models/mpnet/modeling_mpnet.py: post-LN BERT blocks, positions from 2, one relative position bias for all layers.
There is no padding outside attention: everything else sees (T, hidden), T the tokens of all texts together.
Knows no tokenizer, no pooling and no files beyond a checkpoint's tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embedq.model.attention import Attend
from embedq.model.backend import Backend
from embedq.model.config import MPNetConfig
from embedq.model.errors import WeightsError
from embedq.model.linear import Linear, LinearWeights
from embedq.model.packing import Packed
from embedq.model.position_bias import PositionBias
from embedq.model.quantization import quantize
from embedq.model.runtime import Runtime, runtime_for
from embedq.model.weights import Checkpoint, is_finite

Shapes = dict[str, tuple[int, ...]]

#: Beside an int8 weight in a checkpoint: its rows' scales, and what its inputs are multiplied by.
SCALE, INPUT_FACTOR = "weight_scale", "input_factor"
RELATIVE_BIAS = "encoder.relative_attention_bias.weight"


def tensor_shapes(config: MPNetConfig) -> Shapes:
    """Every tensor a checkpoint must have, by its name without prefix."""
    hidden = config.hidden_size
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
        RELATIVE_BIAS: (
            config.relative_attention_num_buckets,
            config.num_attention_heads,
        ),
    }
    weights: Shapes = {
        **linear_shapes(config),
        **{
            f"{_layer_prefix(index)}{part}.LayerNorm": (hidden,)
            for index in range(config.num_hidden_layers)
            for part in ("attention", "output")
        },
    }
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _layer_prefix(index: int) -> str:
    return f"encoder.layer.{index}."


def linear_shapes(config: MPNetConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer, by its name without `.weight`."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    in_layer = {
        **{f"attention.attn.{part}": (hidden, hidden) for part in "qkvo"},
        "intermediate.dense": (intermediate, hidden),
        "output.dense": (hidden, intermediate),
    }
    return {
        f"{_layer_prefix(index)}{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in in_layer.items()
    }


def _quantization_shapes(config: MPNetConfig, checkpoint: Checkpoint) -> Shapes:
    """What stands beside the weights that are stored as int8."""
    shapes: Shapes = {}
    for name, (out_features, in_features) in linear_shapes(config).items():
        if checkpoint.is_int8(f"{name}.weight"):
            shapes[f"{name}.{SCALE}"] = (out_features,)
            if f"{name}.{INPUT_FACTOR}" in checkpoint:
                shapes[f"{name}.{INPUT_FACTOR}"] = (in_features,)
    return shapes


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    out: Linear
    attention_norm: LayerNorm
    intermediate: Linear
    output: Linear
    output_norm: LayerNorm

    def __call__(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.attention_norm(self.out.add(attend(self.qkv(x)), x))
        return self.output_norm(self.output.add(self.intermediate.gelu(x), x))


@dataclass(frozen=True, slots=True)
class Placed:
    """A micro-batch on the device: all that the layers need beside the weights."""

    #: (T,) int32
    ids: Tensor
    #: (T,) int32, rows of the position table
    positions: Tensor
    #: (n,) int64 tokens of each text
    lengths: Tensor
    attend: Attend


class MPNet:
    """Weights on one device in one dtype; calls share nothing that changes, so threads may."""

    def __init__(
        self,
        config: MPNetConfig,
        checkpoint: Checkpoint,
        backend: Backend,
        runtime: Runtime | None = None,
        *,
        keep_layers: bool = True,
    ) -> None:
        """Raises WeightsError if the checkpoint's tensors are not exactly those of `config`.

        keep_layers: false reads each layer whenever it is needed and lets it go again: slow, in little memory.

        Weights that are stored as floats are quantized here if the backend's dtype is int8, all of them; those of a
        quantized checkpoint stay as they are stored, and become floats for another dtype.
        """
        self._shapes = tensor_shapes(config) | _quantization_shapes(config, checkpoint)
        checkpoint.check(self._shapes)
        self.config = config
        self.backend = backend
        self._runtime = runtime or runtime_for(backend.device)
        self._quantizes = backend.dtype == torch.int8 and not checkpoint.is_quantized
        self._checkpoint = checkpoint
        self._load_embeddings(checkpoint)
        self.layers = list(self._stored_layers()) if keep_layers else []

    def _read(self, checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
        """As stored, by their names without `prefix`."""
        stored = checkpoint.read([name for name in self._shapes if name.startswith(prefix)])
        if self.backend.activation_dtype == torch.float16:
            _check_float16(checkpoint.folder, stored)
        # A view of the file keeps all of it mapped: vectors must not, where matrices are converted and let go.
        return {
            name.removeprefix(prefix): tensor.clone() if tensor.dim() == 1 else tensor
            for name, tensor in stored.items()
        }

    def _load_embeddings(self, checkpoint: Checkpoint) -> None:
        backend, tensors = self.backend, self._read(checkpoint, "embeddings.")
        self._words, self._positions = (
            tensors[f"{kind}_embeddings.weight"].to(backend.device, backend.activation_dtype)
            for kind in ("word", "position")
        )
        self._embeddings_norm = self._layer_norm(tensors, "LayerNorm")
        by_bucket = checkpoint.read([RELATIVE_BIAS])[RELATIVE_BIAS].float().to(backend.device)
        self._attention = backend.make_attention(PositionBias.from_buckets(by_bucket, self.config.max_length))

    def _stored_layers(self) -> Iterator[Layer]:
        return (self._load_layer(self._checkpoint, index) for index in range(self.config.num_hidden_layers))

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> Layer:
        # One layer at a time: where weights are converted, only one layer is in memory twice.
        tensors = self._read(checkpoint, _layer_prefix(index))
        return Layer(
            qkv=self._linear(tensors, *(f"attention.attn.{part}" for part in "qkv")),
            out=self._linear(tensors, "attention.attn.o"),
            attention_norm=self._layer_norm(tensors, "attention.LayerNorm"),
            intermediate=self._linear(tensors, "intermediate.dense"),
            output=self._linear(tensors, "output.dense"),
            output_norm=self._layer_norm(tensors, "output.LayerNorm"),
        )

    def _linear(self, tensors: dict[str, Tensor], *names: str) -> Linear:
        """One product for the linear layers `names`, which take the same input."""
        weights = stack([linear_weights(tensors, name) for name in names])
        if self.backend.dtype != torch.int8:
            weights = weights.dequantized()
        return self.backend.make_linear(quantize(weights) if self._quantizes else weights)

    def _layer_norm(self, tensors: dict[str, Tensor], name: str) -> LayerNorm:
        weight, bias = (
            tensors[f"{name}.{kind}"].to(self.backend.device, self.backend.residual_dtype)
            for kind in ("weight", "bias")
        )
        return LayerNorm(weight, bias, self.config.layer_norm_eps)

    def __call__(self, packed: Packed) -> Tensor:
        """(T, hidden) the last layer's output."""
        return self.run(self.place(packed))

    def hidden_states(self, packed: Packed) -> Iterator[Tensor]:
        """(T, hidden) for the embeddings, then for each layer: transformers' `output_hidden_states`, packed."""
        return self._states(self.place(packed))

    def num_attention_cells(self, lengths: Sequence[int]) -> int:
        """As `Attention.num_cells`, of texts with so many tokens each, the longest first."""
        return self._attention.num_cells(lengths)

    def place(self, packed: Packed) -> Placed:
        """All that a micro-batch needs of the host, in one upload: from here on nothing waits for either side."""
        arrays: list[NDArray[Any]] = [packed.ids, packed.positions, np.array(packed.lengths)]
        arrays += self._attention.host_arrays(packed.lengths)
        ids, positions, lengths, *rest = self._runtime.upload(arrays)
        return Placed(ids, positions, lengths, self._attention.prepare(packed.lengths, rest))

    def run(self, placed: Placed) -> Tensor:
        """(T, hidden) the last layer's output."""
        for hidden in self._states(placed):  # noqa: B007 - the last one is the result
            pass
        return hidden

    def _states(self, placed: Placed) -> Iterator[Tensor]:
        hidden = self._embed(placed)
        yield hidden
        for layer in self.layers or self._stored_layers():
            hidden = layer(hidden, placed.attend)
            yield hidden

    def _embed(self, placed: Placed) -> Tensor:
        dtype = self.backend.residual_dtype
        words = functional.embedding(placed.ids, self._words)
        positions = functional.embedding(placed.positions, self._positions)
        return self._embeddings_norm(words.to(dtype) + positions.to(dtype))


def _check_float16(folder: Path, stored: dict[str, Tensor]) -> None:
    for name, tensor in stored.items():
        if not is_finite(tensor.half()):
            raise WeightsError(f"{folder}: {name} has weights beyond float16's 65504: use bfloat16 or float32")


def linear_weights(tensors: dict[str, Tensor], name: str) -> LinearWeights:
    return LinearWeights(
        tensors[f"{name}.weight"],
        tensors[f"{name}.bias"],
        tensors.get(f"{name}.{SCALE}"),
        tensors.get(f"{name}.{INPUT_FACTOR}"),
    )


def stack(parts: list[LinearWeights]) -> LinearWeights:
    """One product instead of several with the same input."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    factors = [part.input_factor for part in parts if part.input_factor is not None]
    same = all(torch.equal(factor, factors[0]) for factor in factors)
    if len(scales) not in (0, len(parts)) or len(factors) not in (0, len(parts)) or not same:
        raise WeightsError("query, key and value of a layer must be quantized alike: quantize the model again")
    return LinearWeights(
        torch.cat([part.weight for part in parts]),
        torch.cat([part.bias for part in parts]),
        torch.cat(scales) if scales else None,
        factors[0] if factors else None,
    )
