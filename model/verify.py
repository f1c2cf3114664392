"""Is this model whole, and does it compute what it should? The checks behind `embedq model verify`.

Knows hashes and what vectors must look like. Prints nothing: each check is a `Check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from embedq.model.errors import ModelFormatError, NonFiniteError
from embedq.model.known_files import ALL_MPNET_BASE_V2, ALL_MPNET_BASE_V2_FILES, WEIGHTS_FILE
from embedq.model.manifest import sha256_of
from embedq.model.progress import Progress, SilentProgress
from embedq.model.sources import ResolvedModel, find_manifest

if TYPE_CHECKING:
    from embedq.model.sentence_encoder import SentenceEncoder

#: Pairs of sentences and their cosine by sentence-transformers 6.2 with all-mpnet-base-v2 in float32 on a CPU.
EXPECTED_COSINES: Final = (
    ("A dog is playing in the garden.", "A puppy runs around in the yard.", 0.613226),
    ("A dog is playing in the garden.", "The central bank raised interest rates.", -0.016311),
    ("How do I reset my password?", "Steps to recover access to your account", 0.450238),
    ("The train leaves at noon.", "The train does not leave at noon.", 0.737284),
    ("Der Hund spielt im Garten.", "A dog is playing in the garden.", 0.020635),
)
#: How far a cosine may be off, by dtype: float32 differs in the order of sums, the others round each step.
COSINE_TOLERANCE: Final = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
#: For a dtype that is not listed, such as int8.
LOOSE_TOLERANCE: Final = 5e-2
#: How far a normalised vector's length may be from 1: it is normalised in float32 whatever the model's dtype.
NORM_TOLERANCE: Final = 1e-4

#: (d,) by text
Vectors = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str


def verify_model(
    resolved: ResolvedModel, *, device: str = "auto", dtype: str = "auto", progress: Progress | None = None
) -> Iterator[Check]:
    """The checks one by one, as they are done. Files that cannot be loaded are a failed check, not an error.

    Raises DeviceError for a device or dtype that is not available here.
    """
    files, weights_sha256 = _check_files(resolved, progress or SilentProgress())
    yield files
    try:
        from embedq.model.sentence_encoder import SentenceEncoder

        encoder = SentenceEncoder.load(resolved.path, device=device, dtype=dtype)
    except ModelFormatError as err:
        yield Check("load", False, str(err))
        return
    dtype_name = str(encoder.dtype).removeprefix("torch.")
    yield Check("load", True, f"{encoder.embedding_dim} dimensions, {dtype_name} on {encoder.device}")
    tolerance = COSINE_TOLERANCE.get(dtype_name, LOOSE_TOLERANCE)
    texts = sorted({text for first, second, _ in EXPECTED_COSINES for text in (first, second)}, key=len)
    try:
        vectors = dict(zip(texts, _encode(encoder, texts), strict=True))
    except NonFiniteError as err:
        yield Check("finite", False, str(err))
        return
    yield Check("finite", True, f"{len(texts)} texts")
    yield from _check_vectors(encoder, vectors, tolerance)
    if ALL_MPNET_BASE_V2 in {resolved.name, _known_name(weights_sha256)}:
        yield _check_cosines(vectors, tolerance)


def _check_files(resolved: ResolvedModel, progress: Progress) -> tuple[Check, str | None]:
    """Hashes against what the fetch verified; and the SHA-256 of the weights."""
    manifest = find_manifest(resolved)
    if manifest is None:
        return _check_own_folder(resolved.path, progress)
    sums = _hash_files(resolved.path, manifest.files, progress)
    bad = [path for path, record in manifest.files.items() if sums.get(path) != record.sha256]
    if bad:
        # The files themselves: behind a link lies the hub's blob, which a new snapshot would be made of again.
        blobs = ", ".join(str((resolved.path / path).resolve()) for path in bad)
        detail = f"{', '.join(bad)} differ from what was fetched: delete {blobs} and fetch it again"
    else:
        detail = f"{len(sums)} files have the SHA-256 they were fetched with"
    return Check("files", not bad, detail), sums.get(WEIGHTS_FILE)


def _check_own_folder(folder: Path, progress: Progress) -> tuple[Check, str | None]:
    sums = _hash_files(folder, {WEIGHTS_FILE: None}, progress)
    sha256 = sums.get(WEIGHTS_FILE)
    known = _known_name(sha256)
    detail = f"the weights are those of {known}" if known else "a folder of your own: no hashes to compare with"
    return Check("files", True, detail), sha256


def _known_name(weights_sha256: str | None) -> str | None:
    return ALL_MPNET_BASE_V2 if weights_sha256 == ALL_MPNET_BASE_V2_FILES[WEIGHTS_FILE].sha256 else None


def _hash_files(folder: Path, paths: Iterable[str], progress: Progress) -> dict[str, str]:
    """SHA-256 by path; a file that is missing is left out."""
    present = [path for path in paths if (folder / path).is_file()]
    progress.start("hash", sum((folder / path).stat().st_size for path in present))
    done_bytes = 0

    def on_bytes(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        progress.update(done_bytes)

    return {path: sha256_of(folder / path, on_bytes) for path in present}


def _check_vectors(encoder: SentenceEncoder, vectors: Vectors, tolerance: float) -> Iterator[Check]:
    """What holds for any model: of length 1 where it normalises, the same alone as in a batch."""
    texts, together = list(vectors), np.stack(list(vectors.values()))
    if encoder.default_normalize:
        error = float(np.abs(np.linalg.norm(together, axis=1) - 1).max())
        yield Check("unit length", error <= NORM_TOLERANCE, f"off by {error:.1e}, at most {NORM_TOLERANCE:.0e}")
    # The shortest and the longest: those that share a batch with texts least like them.
    some = [0, len(texts) - 1]
    alone = np.concatenate([_encode(encoder, [texts[index]]) for index in some])
    error = float(np.abs(1 - _cosines(together[some], alone)).max())
    yield Check("batch equals single", error <= tolerance, f"cosine off by {error:.1e}, at most {tolerance:.0e}")


def _check_cosines(vectors: Vectors, tolerance: float) -> Check:
    first = np.stack([vectors[pair[0]] for pair in EXPECTED_COSINES])
    second = np.stack([vectors[pair[1]] for pair in EXPECTED_COSINES])
    expected = np.array([pair[2] for pair in EXPECTED_COSINES])
    error = float(np.abs(_cosines(first, second) - expected).max())
    return Check(
        "expected cosines",
        error <= tolerance,
        f"{len(expected)} pairs, off by {error:.1e}, at most {tolerance:.0e}",
    )


def _encode(encoder: SentenceEncoder, texts: list[str]) -> NDArray[np.float64]:
    return encoder.encode(texts).astype(np.float64)


def _cosines(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row. NaN stays NaN, and NaN fails every comparison with a tolerance."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    # Vectors of zeros give NaN, and the check says so: numpy need not.
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: NDArray[np.float64] = (first * second).sum(axis=1) / lengths
    return cosines
