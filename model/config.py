"""The shape of an MPNet, as `config.json` gives it.

Knows no weights and no sentence-transformers module: see `modules` for those.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path

from embedq.model.errors import ModelFormatError
from embedq.model.folder import read_json_object, require

#: The only activation MPNet was published with: x * Phi(x) by the exact erf.
HIDDEN_ACT = "gelu"
#: What transformers' MPNetModel uses whatever the config says.
REFERENCE_NUM_BUCKETS = 32
#: The token that has no position of its own, in fairseq's dictionary and hard-coded in transformers' MPNetModel.
PADDING_ID = 1
#: Beyond this distance all offsets share one bucket; a constant in the reference too.
MAX_DISTANCE = 128

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MPNetConfig:
    """Field names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    relative_attention_num_buckets: int
    layer_norm_eps: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ModelFormatError(f"{field.name} must be above 0, not {getattr(self, field.name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ModelFormatError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.max_length < 1:
            raise ModelFormatError(f"max_position_embeddings {self.max_position_embeddings} leaves no room for a token")
        if self.relative_attention_num_buckets // 4 >= MAX_DISTANCE:
            raise ModelFormatError(
                f"relative_attention_num_buckets must be below {4 * MAX_DISTANCE},"
                f" not {self.relative_attention_num_buckets}"
            )
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 2:
            raise ModelFormatError(
                f"relative_attention_num_buckets must be even and 4 or more, not {self.relative_attention_num_buckets}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """Tokens a sequence may have: positions start after the padding token's."""
        return self.max_position_embeddings - PADDING_ID - 1


def read_config(folder: Path) -> MPNetConfig:
    """Raises ModelFormatError naming the file and the field."""
    path = folder / "config.json"
    content = read_json_object(path)
    model_type = require(content, "model_type", str, path)
    if model_type != "mpnet":
        raise ModelFormatError(f"{path}: model_type is {model_type!r}, and only 'mpnet' can be loaded")
    hidden_act = content.get("hidden_act", HIDDEN_ACT)
    if hidden_act != HIDDEN_ACT:
        raise ModelFormatError(f"{path}: hidden_act is {hidden_act!r}, and only {HIDDEN_ACT!r} is supported")
    try:
        config = MPNetConfig(
            vocab_size=require(content, "vocab_size", int, path),
            hidden_size=require(content, "hidden_size", int, path),
            num_hidden_layers=require(content, "num_hidden_layers", int, path),
            num_attention_heads=require(content, "num_attention_heads", int, path),
            intermediate_size=require(content, "intermediate_size", int, path),
            max_position_embeddings=require(content, "max_position_embeddings", int, path),
            relative_attention_num_buckets=require(content, "relative_attention_num_buckets", int, path),
            layer_norm_eps=require(content, "layer_norm_eps", float, path),
        )
    except ModelFormatError as err:
        message = str(err)
        raise ModelFormatError(message if message.startswith(str(path)) else f"{path}: {message}") from err
    if config.relative_attention_num_buckets != REFERENCE_NUM_BUCKETS:
        log.warning(
            "%s: relative_attention_num_buckets is %d; it is honoured here, transformers always uses %d",
            path,
            config.relative_attention_num_buckets,
            REFERENCE_NUM_BUCKETS,
        )
    return config
