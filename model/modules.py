"""What a sentence-transformers folder says beyond the encoder: modules, prompts, lengths.

Reads the layouts of every release up to 6.2: `sentence_transformers.models.Pooling` and the dotted paths of
today. Knows file and field names; no tensors. A bare transformers folder is mean pooling, as in sentence-transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embedq.model.errors import ModelFormatError
from embedq.model.folder import read_json, read_json_object, read_optional_json_object, require
from embedq.model.similarity import DEFAULT_SIMILARITY, SIMILARITY_FUNCTIONS

#: The names `Pooling` gives its modes, in the order it concatenates them under old configs, by the old switches (whose
#: tokens are those of a text, no passwords).
LEGACY_POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",  # nosec B105
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: What `Dense` may apply, as sentence-transformers writes it: always with the class' own defaults.
ACTIVATIONS = {
    "torch.nn.modules.activation.ELU": "elu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}

_OWN_PACKAGE = "sentence_transformers."


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A linear layer behind the pooling."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    #: one of ACTIVATIONS' values
    activation: str
    #: whether its input is added to its output
    residual: bool


@dataclass(frozen=True, slots=True)
class Modules:
    """The pipeline Transformer, Pooling, Dense..., Normalize of one model folder."""

    transformer: Path
    pooling_modes: tuple[str, ...]
    #: What Pooling was saved for; None if it does not say.
    pooling_dim: int | None
    #: Whether the tokens of a prompt are pooled with the text's.
    pooled_prompt: bool
    dense: tuple[DenseConfig, ...]
    normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    #: how the model's vectors are compared: a name of `similarity.SIMILARITY_FUNCTIONS`
    similarity: str
    #: None where neither sentence-transformers' nor the tokenizer's config says one
    max_seq_length: int | None
    lowercase: bool


def read_modules(folder: Path) -> Modules:
    """Raises ModelFormatError for a module or an order of modules that is not supported."""
    transformer, rest = _steps(folder)
    modes, pooling_dim, pooled_prompt = _pooling(rest.pop(0)[1]) if rest else (("mean",), None, True)
    normalize = bool(rest) and rest[-1][0] == "Normalize"
    if normalize:
        _check_feature(rest.pop()[1])
    for kind, path in rest:
        if kind != "Dense":
            raise ModelFormatError(
                f"{folder / 'modules.json'}: {kind} ({path}) is out of place: supported is Transformer, Pooling,"
                " any number of Dense, Normalize"
            )
    own_config = folder / "config_sentence_transformers.json"
    prompts, default_prompt_name = _prompts(own_config)
    max_seq_length, lowercase = _text_limits(transformer)
    return Modules(
        transformer=transformer,
        pooling_modes=modes,
        pooling_dim=pooling_dim,
        pooled_prompt=pooled_prompt,
        dense=tuple(_dense(path) for _, path in rest),
        normalize=normalize,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        similarity=_similarity(own_config),
        max_seq_length=max_seq_length,
        lowercase=lowercase,
    )


def _steps(folder: Path) -> tuple[Path, list[tuple[str, Path]]]:
    """The transformer's folder, and kind and folder of each module behind it."""
    path = folder / "modules.json"
    if not path.exists():
        return folder, []
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ModelFormatError(f"{path} must hold a list of objects")
    steps = [_step(folder, entry, path) for entry in entries]
    if not steps or steps[0][0] != "Transformer":
        raise ModelFormatError(f"{path}: the first module must be a Transformer")
    if len(steps) < 2 or steps[1][0] != "Pooling":
        raise ModelFormatError(f"{path}: the second module must be a Pooling")
    return steps[0][1], steps[1:]


def _step(folder: Path, entry: dict[str, Any], path: Path) -> tuple[str, Path]:
    module_type = require(entry, "type", str, path)
    kind = module_type.rpartition(".")[2]
    # A class of the same name from elsewhere would be code that came with the model.
    if not module_type.startswith(_OWN_PACKAGE) or kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise ModelFormatError(
            f"{path}: module type {module_type!r} is not supported: only sentence-transformers' Transformer, Pooling,"
            " Dense and Normalize"
        )
    place = PurePosixPath(require(entry, "path", str, path))
    if place.is_absolute() or ".." in place.parts:
        raise ModelFormatError(f"{path}: module path {str(place)!r} leads out of the model folder")
    return kind, folder / place


def _pooling(folder: Path) -> tuple[tuple[str, ...], int | None, bool]:
    path = folder / "config.json"
    content = read_json_object(path)
    pooled_prompt = content.get("include_prompt", True)
    if not isinstance(pooled_prompt, bool):
        raise ModelFormatError(f"{path}: field 'include_prompt' must be true or false, not {pooled_prompt!r}")
    if "pooling_mode" in content:
        stored = content["pooling_mode"]
        modes = tuple(stored) if isinstance(stored, list) else (stored,)
    else:
        modes = tuple(mode for switch, mode in LEGACY_POOLING_SWITCHES.items() if content.get(switch)) or ("mean",)
    unknown = [mode for mode in modes if mode not in LEGACY_POOLING_SWITCHES.values()]
    if unknown or not modes:
        raise ModelFormatError(
            f"{path}: pooling_mode {content['pooling_mode']!r} is unknown: use"
            f" {', '.join(LEGACY_POOLING_SWITCHES.values())}"
        )
    name = "embedding_dimension" if "embedding_dimension" in content else "word_embedding_dimension"
    return modes, require(content, name, int, path) if name in content else None, pooled_prompt


def _dense(folder: Path) -> DenseConfig:
    path = folder / "config.json"
    content = read_json_object(path)
    _check_feature(folder)
    # Tanh is what sentence-transformers takes when the field is missing.
    stored = content.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(stored, str) or stored not in ACTIVATIONS:
        raise ModelFormatError(
            f"{path}: activation_function {stored!r} is not supported: only {', '.join(ACTIVATIONS)}"
        )
    return DenseConfig(
        folder=folder,
        in_features=require(content, "in_features", int, path),
        out_features=require(content, "out_features", int, path),
        bias=content.get("bias", True) is not False,
        activation=ACTIVATIONS[stored],
        residual=content.get("use_residual", False) is True,
    )


def _check_feature(folder: Path) -> None:
    """Newer releases let a module work on other things than the sentence's vector."""
    path = folder / "config.json"
    content = read_optional_json_object(path)
    for field in ("module_input_name", "module_output_name"):
        if content.get(field) not in (None, "sentence_embedding"):
            raise ModelFormatError(f"{path}: {field} {content[field]!r} is not supported, only 'sentence_embedding'")


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    content = read_optional_json_object(path)
    stored = content.get("prompts") or {}
    if not isinstance(stored, dict):
        raise ModelFormatError(f"{path}: field 'prompts' must be an object from name to text")
    # Releases write null for names they know and the model has no prompt for.
    prompts = {name: text for name, text in stored.items() if isinstance(text, str)}
    default = content.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in stored):
        raise ModelFormatError(f"{path}: default_prompt_name {default!r} is not among the prompts")
    return prompts, default if default in prompts else None


def _similarity(path: Path) -> str:
    """A name that is none of the four is passed over, as in sentence-transformers."""
    stored = read_optional_json_object(path).get("similarity_fn_name")
    return stored if isinstance(stored, str) and stored in SIMILARITY_FUNCTIONS else DEFAULT_SIMILARITY


def _text_limits(transformer: Path) -> tuple[int | None, bool]:
    """Up to release 5 the length stands in sentence_bert_config.json, since then with the tokenizer."""
    path = transformer / "sentence_bert_config.json"
    content = read_optional_json_object(path)
    max_seq_length = content.get("max_seq_length")
    if max_seq_length is not None and require(content, "max_seq_length", int, path) < 1:
        raise ModelFormatError(f"{path}: field 'max_seq_length' must be above 0, not {max_seq_length}")
    lowercase = content.get("do_lower_case") is True
    return max_seq_length or _tokenizer_max_length(transformer), lowercase


def _tokenizer_max_length(transformer: Path) -> int | None:
    value = read_optional_json_object(transformer / "tokenizer_config.json").get("model_max_length")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # transformers writes int(1e30) for "no limit", others Infinity.
    return int(value) if 1 <= value < math.inf else None
