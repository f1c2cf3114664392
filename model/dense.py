"""A linear layer behind the pooling, with the weights of its own folder.

Knows sentence-transformers' `Dense`; no tokens and no encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from embedq.model.modules import DenseConfig
from embedq.model.weights import Checkpoint

#: By the names that `modules` gives them.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": functional.elu,
    "gelu": functional.gelu,
    "identity": lambda vectors: vectors,
    "leaky_relu": functional.leaky_relu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Dense:
    """sentence-transformers' `Dense`, always in float32: it is small, and vectors are float32 from pooling on."""

    def __init__(self, config: DenseConfig, device: torch.device) -> None:
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (config.out_features, config.in_features)}
        if config.bias:
            shapes["linear.bias"] = (config.out_features,)
        # Of another width, the input goes through a layer of its own before it is added.
        if config.residual and config.in_features != config.out_features:
            shapes["residual.weight"] = (config.out_features, config.in_features)
        checkpoint = Checkpoint(config.folder)
        checkpoint.check(shapes)
        tensors = {name: tensor.to(device, torch.float32) for name, tensor in checkpoint.read(shapes).items()}
        self.out_features = config.out_features
        self._weight = tensors["linear.weight"]
        self._bias = tensors.get("linear.bias")
        self._activate = ACTIVATION_FUNCTIONS[config.activation]
        self._is_residual = config.residual
        self._residual_weight = tensors.get("residual.weight")

    def __call__(self, vectors: Tensor) -> Tensor:
        out = self._activate(functional.linear(vectors, self._weight, self._bias))
        if not self._is_residual:
            return out
        if self._residual_weight is not None:
            vectors = functional.linear(vectors, self._residual_weight)
        return out + vectors
