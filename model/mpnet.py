"""MPNet's encoder on packed tokens: from token ids to one vector a token.

MPNet: Masked and Permuted Pre-training for Language Understanding (arXiv 2004.09297), as in transformers'
models/mpnet/modeling_mpnet.py: post-LN BERT blocks, positions from 2, one relative position bias for all layers.
There is no padding outside attention: everything else sees (T, hidden), T the tokens of all texts together.
Knows no tokenizer, no pooling and no files beyond a checkpoint's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embedq.model.config import MAX_DISTANCE, MPNetConfig
from embedq.model.errors import WeightsError
from embedq.model.linear import Linear
from embedq.model.packing import Group, Packed, plan_groups
from embedq.model.runtime import Runtime, runtime_for
from embedq.model.weights import Checkpoint, is_finite

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: MPNetConfig) -> Shapes:
    """Every tensor a checkpoint must have, by its name without prefix."""
    hidden = config.hidden_size
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
        "encoder.relative_attention_bias.weight": (
            config.relative_attention_num_buckets,
            config.num_attention_heads,
        ),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"{_layer_prefix(index)}{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes


def _layer_prefix(index: int) -> str:
    return f"encoder.layer.{index}."


def _layer_shapes(config: MPNetConfig) -> Shapes:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    weights: Shapes = {
        **{f"attention.attn.{part}": (hidden, hidden) for part in "qkvo"},
        "intermediate.dense": (intermediate, hidden),
        "output.dense": (hidden, intermediate),
        "attention.LayerNorm": (hidden,),
        "output.LayerNorm": (hidden,),
    }
    return {f"{name}.weight": shape for name, shape in weights.items()} | {
        f"{name}.bias": shape[:1] for name, shape in weights.items()
    }


def relative_position_bucket(offsets: Tensor, num_buckets: int) -> Tensor:
    """Which row of the bias table an offset j - i (key minus query) takes: as the reference, equal for all offsets.

    Half the buckets are for keys behind the query, half for those ahead; half of each half for one distance
    each, the rest for logarithmically growing ranges up to MAX_DISTANCE.
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    distance = offsets.abs()
    # The reference's own order of float32 operations: another one moves borders by a token.
    scaled = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (per_side - exact)
    # log(0) is -inf, which has no integer; those places are taken by `distance` anyway.
    far = (exact + scaled.clamp(min=0).to(torch.long)).clamp(max=per_side - 1)
    side = (offsets > 0).to(torch.long) * per_side
    return side + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention needs of one group beyond the weights: the same in every layer, so built once a batch."""

    group: Group
    #: (num_texts * heads, L, L) relative position bias, -inf where the key is padding
    bias: Tensor
    #: (3 * num_texts * heads * L,) which rows of qkv as (T * 3 * heads, head_dim) make up queries, keys, values
    gather: Tensor
    #: (tokens * heads,) which rows of the context as (num_texts * heads * L, head_dim) are no padding
    scatter: Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    num_heads: int
    qkv: Linear
    out: Linear
    attention_norm: LayerNorm
    intermediate: Linear
    output: Linear
    output_norm: LayerNorm

    def __call__(self, x: Tensor, plans: list[AttentionPlan]) -> Tensor:
        x = self.attention_norm(self.out.add(self._attention(x, plans), x))
        return self.output_norm(self.output.add(self.intermediate.gelu(x), x))

    def _attention(self, x: Tensor, plans: list[AttentionPlan]) -> Tensor:
        """(T, hidden) before the output projection."""
        head_dim = x.shape[1] // self.num_heads
        qkv = self.qkv(x).view(-1, head_dim)  # (T * 3 * heads, head_dim)
        context = torch.empty_like(x)
        for plan in plans:
            query, key, value = qkv.index_select(0, plan.gather).view(3, *plan.bias.shape[:2], head_dim)
            attended = _attend(query, key, value, plan.bias)  # (num_texts * heads, L, head_dim)
            place = context[plan.group.start : plan.group.end].view(-1, head_dim)
            torch.index_select(attended.view(-1, head_dim), 0, plan.scatter, out=place)
        return context


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    # alpha scales inside the product, before float16 could overflow
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=1 / math.sqrt(query.shape[-1]))
    return torch.bmm(scores.softmax(-1), value)


def _check_float16(folder: Path, stored: dict[str, Tensor]) -> None:
    for name, tensor in stored.items():
        if not is_finite(tensor.half()):
            raise WeightsError(f"{folder}: {name} has weights beyond float16's 65504: use bfloat16 or float32")


@dataclass(frozen=True, slots=True)
class Placed:
    """A micro-batch on the device: all that the layers need beside the weights."""

    #: (T,) int32
    ids: Tensor
    #: (T,) int32, rows of the position table
    positions: Tensor
    #: (n,) int64 tokens of each text
    lengths: Tensor
    plans: list[AttentionPlan]


class MPNet:
    """Weights on one device in one dtype; calls share nothing that changes, so threads may."""

    def __init__(
        self,
        config: MPNetConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_scores: int,
        make_linear: Callable[[Tensor, Tensor], Linear],
        runtime: Runtime | None = None,
    ) -> None:
        """Raises WeightsError if the checkpoint's tensors are not exactly those of `config`.

        `max_scores` bounds the attention scores computed at once, in elements (heads * n * L * L).
        `make_linear` takes a weight and a bias on their device in their dtype, and may keep them.
        """
        checkpoint.check(tensor_shapes(config))
        self.config = config
        self.device = device
        self.dtype = dtype
        self._max_scores_per_head = max_scores // config.num_attention_heads
        self._make_linear = make_linear
        self._runtime = runtime or runtime_for(device)
        self._load_embeddings(checkpoint)
        self.layers = [self._load_layer(checkpoint, index) for index in range(config.num_hidden_layers)]

    def _read(self, checkpoint: Checkpoint, prefix: str, names: list[str]) -> dict[str, Tensor]:
        stored = checkpoint.read([prefix + name for name in names])
        if self.dtype == torch.float16:
            _check_float16(checkpoint.folder, stored)
        tensors = {name: stored[prefix + name].to(self.device, self.dtype) for name in names}
        # A view of the file keeps all of it mapped: vectors must not, where matrices are converted and let go.
        return {name: tensor.clone() if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}

    def _load_embeddings(self, checkpoint: Checkpoint) -> None:
        names = ["word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"]
        tensors = self._read(checkpoint, "embeddings.", names)
        self._words = tensors["word_embeddings.weight"]
        self._positions = tensors["position_embeddings.weight"]
        self._embeddings_norm = self._layer_norm(tensors, "LayerNorm")
        name = "relative_attention_bias.weight"
        self._bias_by_offset = self._offset_table(self._read(checkpoint, "encoder.", [name])[name])

    def _offset_table(self, bias_by_bucket: Tensor) -> Tensor:
        """(heads, 2 * max_length - 1) bias of every offset j - i from -(max_length - 1) on."""
        reach = self.config.max_length - 1
        offsets = torch.arange(-reach, reach + 1)
        buckets = relative_position_bucket(offsets, self.config.relative_attention_num_buckets)
        return bias_by_bucket[buckets.to(self.device)].t().contiguous()

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> Layer:
        # One layer at a time: where weights are converted, only one layer is in memory twice.
        tensors = self._read(checkpoint, _layer_prefix(index), list(_layer_shapes(self.config)))
        qkv_weight, qkv_bias = (
            torch.cat([tensors[f"attention.attn.{part}.{kind}"] for part in "qkv"]) for kind in ("weight", "bias")
        )
        return Layer(
            num_heads=self.config.num_attention_heads,
            qkv=self._make_linear(qkv_weight, qkv_bias),
            out=self._linear(tensors, "attention.attn.o"),
            attention_norm=self._layer_norm(tensors, "attention.LayerNorm"),
            intermediate=self._linear(tensors, "intermediate.dense"),
            output=self._linear(tensors, "output.dense"),
            output_norm=self._layer_norm(tensors, "output.LayerNorm"),
        )

    def _linear(self, tensors: dict[str, Tensor], name: str) -> Linear:
        return self._make_linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def _layer_norm(self, tensors: dict[str, Tensor], name: str) -> LayerNorm:
        return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], self.config.layer_norm_eps)

    def __call__(self, packed: Packed) -> Tensor:
        """(T, hidden) the last layer's output."""
        return self.run(self.place(packed))

    def hidden_states(self, packed: Packed) -> Iterator[Tensor]:
        """(T, hidden) for the embeddings, then for each layer: transformers' `output_hidden_states`, packed."""
        return self._states(self.place(packed))

    def place(self, packed: Packed) -> Placed:
        """All that a micro-batch needs of the host, in one upload: from here on nothing waits for either side."""
        groups = list(plan_groups(packed.lengths, self._max_scores_per_head))
        num_heads = self.config.num_attention_heads
        arrays: list[NDArray[Any]] = [packed.ids, packed.positions, np.array(packed.lengths)]
        for group in groups:
            arrays += [group.gather_rows(num_heads), group.scatter_rows(num_heads), ~group.is_token()]
        ids, positions, lengths, *rest = self._runtime.upload(arrays)
        plans = [self._plan(group, *rest[3 * index : 3 * index + 3]) for index, group in enumerate(groups)]
        return Placed(ids, positions, lengths, plans)

    def run(self, placed: Placed) -> Tensor:
        """(T, hidden) the last layer's output."""
        for hidden in self._states(placed):  # noqa: B007 - the last one is the result
            pass
        return hidden

    def _states(self, placed: Placed) -> Iterator[Tensor]:
        hidden = self._embeddings_norm(
            functional.embedding(placed.ids, self._words) + functional.embedding(placed.positions, self._positions)
        )
        yield hidden
        for layer in self.layers:
            hidden = layer(hidden, placed.plans)
            yield hidden

    def _plan(self, group: Group, gather: Tensor, scatter: Tensor, is_padding: Tensor) -> AttentionPlan:
        bias = self.position_bias(group.length).expand(len(group.lengths), -1, -1, -1)
        if group.is_ragged:
            bias = bias.masked_fill(is_padding[:, None, None, :], -math.inf)
        return AttentionPlan(group, bias.flatten(0, 1), gather, scatter)

    def position_bias(self, length: int) -> Tensor:
        """(heads, length, length) bias of query i for key j; it depends only on j - i."""
        centre = self.config.max_length - 1
        offsets = self._bias_by_offset[:, centre - length + 1 : centre + length]  # -(length - 1) .. length - 1
        # Window w holds offsets w - (length - 1) .. w: the row of query i = length - 1 - w.
        return offsets.unfold(1, length, 1).flip(1)
