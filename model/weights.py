"""Tensors from the safetensors files of a model folder, strict in both directions.

Knows file formats and tensor names, not what the tensors are for. Nothing here runs code from a file: pickle is
not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from embedq.model.errors import ModelFormatError, WeightsError
from embedq.model.folder import read_json_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
#: What a checkpoint saved together with its training head calls the encoder.
PREFIX = "mpnet."
#: Known to be unused by sentence embeddings: the masked-LM head, BERT's pooler, a buffer of old versions.
IGNORED = ("lm_head.", "pooler.", "embeddings.position_ids")
#: Names in one error message, beyond which the rest is counted.
MAX_NAMES_SHOWN = 8

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_INT8 = "I8"
_HASH_CHUNK_BYTES = 1 << 20


class Checkpoint:
    """The tensors of one folder by their name without prefix. Headers are read at once, data when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        #: name -> (file, name in the file)
        self._places: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in self.files:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for stored_name in file.keys():  # noqa: SIM118 - no mapping
                    name = stored_name.removeprefix(PREFIX)
                    if name.startswith(IGNORED):
                        continue
                    if name in self._places:
                        raise WeightsError(f"{path}: tensor {name} is there twice")
                    view = file.get_slice(stored_name)
                    self._places[name] = (path, stored_name)
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = view.get_dtype()
        except (SafetensorError, OSError) as err:
            raise _unreadable(path, err) from err

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def is_int8(self, name: str) -> bool:
        """Whether a tensor is there and stored as int8."""
        return self._dtypes.get(name) == _INT8

    @property
    def is_quantized(self) -> bool:
        return _INT8 in self._dtypes.values()

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises one WeightsError that names every tensor missing, unexpected, of another shape or no number.

        int8 is for matrices of which `<name>_scale` is expected too.
        """
        problems = [
            *(f"{name} is missing" for name in expected if name not in self._shapes),
            *(f"{name} is unexpected" for name in self._shapes if name not in expected),
            *(
                f"{name} has shape {self._shapes[name]}, expected {shape}"
                for name, shape in expected.items()
                if name in self._shapes and self._shapes[name] != shape
            ),
            *(
                f"{name} has dtype {self._dtypes[name]}, expected one of {', '.join(_FLOAT_DTYPES)}"
                for name in expected
                if self._dtypes.get(name, "F32") not in _FLOAT_DTYPES
                and not (self.is_int8(name) and f"{name}_scale" in expected)
            ),
        ]
        if problems:
            shown = "; ".join(problems[:MAX_NAMES_SHOWN])
            more = f"; and {len(problems) - MAX_NAMES_SHOWN} more" if len(problems) > MAX_NAMES_SHOWN else ""
            raise WeightsError(f"{self.folder}: the weights do not fit config.json: {shown}{more}")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors as stored, on the CPU.

        They are views of the mapped file: nothing is copied until it is touched, and the mapping ends when the last
        of them is dropped. So ask for a few at a time where they are converted.
        Raises WeightsError naming a tensor with NaN or Inf.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._places[name][0], []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for path, names_here in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    tensors.update({name: file.get_tensor(self._places[name][1]) for name in names_here})
            except (SafetensorError, OSError) as err:
                raise _unreadable(path, err) from err
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise WeightsError(f"{self.folder}: {name} holds NaN or Inf: the model is broken, get another copy")
        return tensors

    def sha256(self) -> str:
        """Of all weight files in order of their names; reads them whole (about 1 GB/s)."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor Inf; reads it once, without a copy."""
    # A sum with one of them is not finite; nor may be a sum of large numbers, hence the second look.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        return _shards(folder / INDEX_FILE)
    for name in PICKLE_FILES:
        if (folder / name).exists():
            raise ModelFormatError(
                f"{folder} has only {name}, a pickle, which can run code and is not read; convert it: load the model"
                " with sentence-transformers or transformers, save it again and load that folder"
            )
    raise ModelFormatError(f"{folder / WEIGHTS_FILE} is missing: is this the folder of a whole model?")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{index}: field 'weight_map' must be an object from tensor to file")
    # A name with folders in it could reach outside the model.
    names = sorted({Path(str(name)).name for name in weight_map.values()})
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ModelFormatError(f"{index} names files that are missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _unreadable(path: Path, err: Exception) -> ModelFormatError:
    return ModelFormatError(f"{path} is corrupt or cut short ({err}): delete it and fetch the model again")
