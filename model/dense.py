"""A linear layer behind the pooling, with the weights of its own folder.

Knows sentence-transformers' `Dense`; no tokens and no encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from embedq.model.modules import DenseConfig
from embedq.model.weights import Checkpoint


class Dense:
    """sentence-transformers' `Dense`, always in float32: it is small, and vectors are float32 from pooling on."""

    def __init__(self, config: DenseConfig, device: torch.device) -> None:
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (config.out_features, config.in_features)}
        if config.bias:
            shapes["linear.bias"] = (config.out_features,)
        checkpoint = Checkpoint(config.folder)
        checkpoint.check(shapes)
        tensors = checkpoint.read(shapes)
        self._weight = tensors["linear.weight"].to(device, torch.float32)
        self._bias = tensors["linear.bias"].to(device, torch.float32) if config.bias else None
        self._is_tanh = config.activation == "tanh"

    def __call__(self, vectors: Tensor) -> Tensor:
        vectors = functional.linear(vectors, self._weight, self._bias)
        return vectors.tanh() if self._is_tanh else vectors
