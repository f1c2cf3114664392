"""The model cache on disk: one folder per model and revision, visible only when it is whole and verified.

    $EMBEDQ_CACHE/models/<org>--<name>/<revision>/      the files and embedq-manifest.json
                                      /.lock            held while somebody fetches
                                      /.fetching-<id>/  scratch; what is left of one belongs to a killed fetch

Knows nothing of networks: what is fetched, and how, is the caller's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from embedq.model.errors import ModelDownloadError
from embedq.model.manifest import MANIFEST_FILE, Manifest, read_manifest
from embedq.model.progress import Progress

#: What a path that cannot be made or written raises, as against a network's errors.
UNWRITABLE: Final = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO),
        *(errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
LOCK_FILE: Final = ".lock"
SCRATCH_PREFIX: Final = ".fetching-"
#: Of a commit, that they may stand for the whole; fewer may be a tag or a branch.
COMMIT_PREFIX: Final = re.compile("[0-9a-f]{7,40}")
MEGABYTE: Final = 1_000_000


def cache_root() -> Path:
    """EMBEDQ_CACHE, else the user's cache folder + /embedq."""
    if chosen := os.environ.get("EMBEDQ_CACHE"):
        return _expanded(chosen)
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "embedq"


def _expanded(folder: str) -> Path:
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as err:
        raise ModelDownloadError(
            f"the cache {folder} is in a home folder there is not: set EMBEDQ_CACHE to a whole path"
        ) from err


def find_cached(name: str, revision: str | None = None) -> Manifest | None:
    """The newest complete copy of `name` at `revision`, a commit or its beginning; sizes are compared."""
    folder = _model_folder(name)
    for path in sorted(_glob(folder, f"*/{MANIFEST_FILE}"), key=_modified_at, reverse=True):
        manifest = read_manifest(path.parent)
        if manifest and _is_revision(manifest.revision, revision) and manifest.sizes_match():
            return manifest
    return None


def find_by_folder(folder: Path) -> Manifest | None:
    """What we recorded of a folder, ours or the hub's cache's; its files may have changed since."""
    wanted = folder.resolve()
    for path in _glob(cache_root() / "models", f"*/*/{MANIFEST_FILE}"):
        manifest = read_manifest(path.parent)
        if manifest and manifest.folder.resolve() == wanted:
            return manifest
    return None


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:
        # A cache that cannot be read holds nothing; whoever wants to write it hears why.
        return []


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_revision(revision: str, wanted: str | None) -> bool:
    if not wanted or revision == wanted:
        return True
    return COMMIT_PREFIX.fullmatch(wanted) is not None and revision.startswith(wanted)


@contextmanager
def fetching(name: str, progress: Progress) -> Iterator[Path]:
    """An empty scratch folder of our own, while no other process fetches `name`; it is gone afterwards.

    Raises ModelDownloadError, on one line, when the disk is full or the cache cannot be written.
    """
    folder = _model_folder(name)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / LOCK_FILE, progress):
            _remove_scratch(folder)
            scratch = folder / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def publish(staged: Path, manifest: Manifest) -> Manifest:
    """Make a verified folder the cached copy in one rename. Only inside `fetching`."""
    final = _model_folder(manifest.name) / manifest.revision
    with disk_errors(staged):
        Manifest(manifest.name, manifest.revision, manifest.source, staged, manifest.files).write(staged)
        # Later loads compare sizes only, so the bytes must be on the disk before the name is.
        for path in [*staged.rglob("*"), staged]:
            _sync(path)
        if final.exists():
            final.rename(staged.with_name("replaced"))
        staged.rename(final)
        _sync(final.parent)
    return Manifest(manifest.name, manifest.revision, manifest.source, final, manifest.files)


def record(manifest: Manifest) -> None:
    """Remember that a folder outside our cache was verified. A cache that cannot be written costs a later
    re-check, not the model."""
    folder = _model_folder(manifest.name) / manifest.revision
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write(folder)


def require_space(folder: Path, needed_bytes: int, setting: str = "EMBEDQ_CACHE") -> None:
    """Raise ModelDownloadError if the disk of `folder` (which need not exist yet) has less free."""
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ModelDownloadError(
            f"fetching needs {_megabytes(needed_bytes)} MB free in {folder},"
            f" and there are {_megabytes(free)}: free some, or set {setting} to a folder on another disk"
        )


@contextmanager
def disk_errors(folder: Path, setting: str = "EMBEDQ_CACHE") -> Iterator[None]:
    """Turn what a disk says into one line with a way out."""
    try:
        yield
    except OSError as err:
        hint = f"set {setting} to a folder on another disk"
        if is_disk_full(err):
            raise ModelDownloadError(f"no space left in {folder}: free some, or {hint}") from err
        if err.errno in UNWRITABLE:
            raise ModelDownloadError(f"cannot write {folder} ({err.strerror}): {hint}") from err
        raise


def is_disk_full(err: BaseException | None) -> bool:
    while err is not None:
        if isinstance(err, OSError) and err.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        err = err.__cause__ or err.__context__
    return False


def _model_folder(name: str) -> Path:
    return cache_root() / "models" / name.replace("/", "--")


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    # flock is given up by the kernel when its process dies, however it dies: no stale lock to reason about.
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note("another process is fetching this model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_scratch(folder: Path) -> None:
    """Only under the lock: then every scratch folder is one whose process was killed."""
    for leftover in folder.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(count: int) -> str:
    return f"{-(-count // MEGABYTE):,}"
