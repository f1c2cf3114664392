"""What a model folder holds, read from its files: `embedq model inspect`.

Knows file names and headers. Loads no tensor and runs no model, so it answers at once and needs no torch. One file is
read whole: weights that may be all-mpnet-base-v2's under another name, whose ranges ship.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from embedq.model.calibration import DIGEST_DIGITS, find_calibration
from embedq.model.config import read_config
from embedq.model.errors import ModelFormatError
from embedq.model.known_files import ALL_MPNET_BASE_V2_FILES, WEIGHTS_FILE
from embedq.model.manifest import sha256_of
from embedq.model.modules import Modules, read_modules
from embedq.model.sources import ResolvedModel

#: safetensors' names, in the words of the command line.
DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class Inspection:
    """Field names are the keys of `--json`."""

    name: str
    path: str
    #: `hub`, `package-index` or `folder`
    source: str
    revision: str | None
    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    max_positions: int
    #: tokens of one text, the special ones included
    max_seq_length: int
    pooling: list[str]
    normalize: bool
    embedding_dim: int
    prompts: dict[str, str]
    #: cosine, dot, euclidean or manhattan
    similarity: str
    #: digest of the ranges for int8 and uint8 vectors that are there without a file being given; None: there are none
    calibration: str | None
    calibrated_dimensions: list[int]
    tensors: int
    parameters: int
    #: of the weight files
    bytes: int
    #: of most parameters
    dtype: str


def inspect_model(resolved: ResolvedModel) -> Inspection:
    """Raises ModelFormatError for a folder that cannot be loaded either."""
    modules = read_modules(resolved.path)
    config = read_config(modules.transformer)
    embedding_dim = len(modules.pooling_modes) * config.hidden_size
    calibration = find_calibration(resolved.path, resolved.name, resolved.revision or _known_digest(modules))
    return Inspection(
        name=resolved.name,
        path=str(resolved.path),
        source=resolved.source,
        revision=resolved.revision,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        max_seq_length=min(modules.max_seq_length or config.max_length, config.max_length),
        pooling=list(modules.pooling_modes),
        normalize=modules.normalize,
        embedding_dim=modules.dense[-1].out_features if modules.dense else embedding_dim,
        prompts=modules.prompts,
        similarity=modules.similarity,
        calibration=calibration.digest if calibration else None,
        calibrated_dimensions=calibration.dimensions if calibration else [],
        **_weights(modules),
    )


def _known_digest(modules: Modules) -> str:
    """What the encoder would report as the revision, if the weights may be those whose ranges ship; else nothing."""
    weights = modules.transformer / WEIGHTS_FILE
    is_like = weights.is_file() and weights.stat().st_size == ALL_MPNET_BASE_V2_FILES[WEIGHTS_FILE].bytes
    return sha256_of(weights)[:DIGEST_DIGITS] if is_like else ""


def _weights(modules: Modules) -> dict[str, Any]:
    files = [
        file
        for folder in (modules.transformer, *(dense.folder for dense in modules.dense))
        for file in _weight_files(folder)
    ]
    tensors = 0
    parameters: Counter[str] = Counter()
    for file in files:
        for dtype, count in _headers(file):
            tensors += 1
            parameters[dtype] += count
    dtype = parameters.most_common(1)[0][0] if parameters else "none"
    return {
        "tensors": tensors,
        "parameters": parameters.total(),
        "bytes": sum(file.stat().st_size for file in files),
        "dtype": DTYPE_NAMES.get(dtype, dtype),
    }


def _weight_files(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise ModelFormatError(f"{whole} is missing: is this the folder of a whole model?")
    return files


def _headers(path: Path) -> list[tuple[str, int]]:
    """Type and number of elements of each tensor."""
    try:
        with safe_open(path, framework="np") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - no mapping
            return [(view.get_dtype(), math.prod(view.get_shape())) for view in slices]
    except (SafetensorError, OSError) as err:
        raise ModelFormatError(f"{path} is corrupt or cut short ({err}): delete it and fetch the model again") from err
