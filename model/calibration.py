"""Where the ranges of int8 and uint8 vectors come from: a sample, a file, or what ships. numpy and safetensors only.

A dimension's range is its lowest and highest value over sample texts; what is made of it is `precision`'s. Knows no
model and no device.

A calibration file is safetensors: `ranges` (2, d) float32 for all dimensions, `ranges.256` for vectors cut to 256,
because cutting makes unit vectors longer in what is left. Its digest names it in results.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from embedq.model.errors import ModelFormatError, ModelOptionError
from embedq.model.known_files import ALL_MPNET_BASE_V2, ALL_MPNET_BASE_V2_FILES, WEIGHTS_FILE
from embedq.model.precision import Ranges, ranges_fault

#: Looked for in a model's folder.
CALIBRATION_FILE: Final = "embedq_calibration.safetensors"
#: What results of the stand-in name: ranges from -1 to 1, whatever the dimensions.
UNIT_DIGEST: Final = "unit"
#: Hex digits of a digest.
DIGEST_DIGITS: Final = 12

_SHIPPED_FILE: Final = "all-mpnet-base-v2.calibration.safetensors"
#: What a plain folder with these weights reports as its revision.
_KNOWN_REVISION: Final = ALL_MPNET_BASE_V2_FILES[WEIGHTS_FILE].sha256[:DIGEST_DIGITS]
_TENSOR_NAME = re.compile(r"ranges(?:\.(\d{1,6}))?")


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The ranges of one model."""

    #: number of dimensions -> (2, d) float32, the lowest values and the highest
    ranges: Mapping[int, Ranges]
    #: whether the sample's vectors had unit length
    normalized: bool
    #: the first digits of the SHA-256 of all of the above
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self._content_digest())

    def _content_digest(self) -> str:
        # Of the numbers, not of a file: safetensors writes its metadata in any order.
        content = hashlib.sha256(b"normalized" if self.normalized else b"raw")
        for dimensions in sorted(self.ranges):
            content.update(f" {dimensions} ".encode())
            content.update(self.ranges[dimensions].astype("<f4").tobytes())
        return content.hexdigest()[:DIGEST_DIGITS]

    @property
    def dimensions(self) -> list[int]:
        return sorted(self.ranges)

    def ranges_for(self, dimensions: int, *, normalized: bool | None = None) -> Ranges:
        """(2, dimensions) float32. `normalized`: whether the vectors have unit length, if that is to be checked.

        Raises ModelOptionError where vectors like these were not calibrated.
        """
        if normalized not in (None, self.normalized):
            raise ModelOptionError(
                f"calibration {self.digest} is for vectors {'with' if self.normalized else 'without'} unit length:"
                f" ask for normalize={str(self.normalized).lower()}, or give ranges"
            )
        if dimensions not in self.ranges:
            known = ", ".join(map(str, self.dimensions))
            raise ModelOptionError(
                f"calibration {self.digest} has no ranges for {dimensions} dimensions, only for {known}:"
                f" calibrate again with --dimensions {dimensions}"
            )
        return self.ranges[dimensions]

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Raises ModelFormatError, naming the file."""
        try:
            return cls._parse(path.read_bytes())
        except OSError as err:
            raise ModelFormatError(f"calibration file {path} cannot be read ({err.strerror})") from err
        except ModelFormatError as err:
            raise ModelFormatError(f"{path}: {err}; delete it, and write it with embedq model calibrate") from err

    @classmethod
    def _parse(cls, content: bytes) -> Calibration:
        try:
            tensors = load(content)
        except (SafetensorError, KeyError, ValueError, TypeError) as err:
            raise ModelFormatError(f"not a safetensors file of ranges ({err})") from err
        normalized = tensors.pop("normalized", None)
        if normalized is None or normalized.shape != (1,) or "ranges" not in tensors:
            raise ModelFormatError("the tensors `ranges` and `normalized` are not both there")
        return cls(dict(_named(name, tensor) for name, tensor in tensors.items()), bool(normalized[0]))

    def to_bytes(self, about: Mapping[str, str]) -> bytes:
        """What `read` reads; `about` becomes the file's metadata, for people."""
        whole = max(self.ranges)
        tensors: dict[str, NDArray[np.generic]] = {
            "ranges" if count == whole else f"ranges.{count}": ranges for count, ranges in self.ranges.items()
        }
        tensors["normalized"] = np.array([self.normalized], np.uint8)
        return save(tensors, dict(about))


def _named(name: str, tensor: NDArray[np.generic]) -> tuple[int, Ranges]:
    found = _TENSOR_NAME.fullmatch(name)
    if found is None:
        raise ModelFormatError(f"tensor {name!r} is unexpected")
    if reason := ranges_fault(tensor):
        raise ModelFormatError(f"tensor {name!r} {reason}")
    dimensions = tensor.shape[1]
    if found[1] and int(found[1]) != dimensions:
        raise ModelFormatError(f"tensor {name!r} is for {dimensions} dimensions")
    return dimensions, tensor.astype(np.float32)


def unit_ranges(dimensions: int) -> Ranges:
    """-1 to 1 in every dimension: unit vectors cannot leave it."""
    return np.repeat(np.array([[-1], [1]], np.float32), dimensions, axis=1)


def own_calibration(folder: Path) -> Calibration | None:
    """The model folder's, if it has one. Raises ModelFormatError for a file that cannot be read."""
    path = folder / CALIBRATION_FILE
    return Calibration.read(path) if path.exists() else None


def shipped_calibration(name: str, revision: str) -> Calibration | None:
    """What ships for this model; None for any but all-mpnet-base-v2, under whatever name its weights are."""
    return _shipped() if name == ALL_MPNET_BASE_V2 or revision == _KNOWN_REVISION else None


def find_calibration(folder: Path, name: str, revision: str) -> Calibration | None:
    """The model folder's, else what ships."""
    return own_calibration(folder) or shipped_calibration(name, revision)


def shipped_ranges(digest: str, dimensions: int) -> Ranges:
    """The ranges behind a result's `calibration`, where they ship with the package.

    Raises ModelOptionError for any other digest: its ranges are in the file that its worker was given.
    """
    if digest == UNIT_DIGEST:
        return unit_ranges(dimensions)
    if digest != _shipped().digest:
        raise ModelOptionError(
            f"no ranges ship under {digest!r}: read the worker's calibration file with Calibration.read"
        )
    return _shipped().ranges_for(dimensions)


@cache
def _shipped() -> Calibration:
    return Calibration._parse(files("embedq.model").joinpath(_SHIPPED_FILE).read_bytes())
