"""Models from the hub, through huggingface_hub: its cache, token, endpoint and offline switch are honoured.

Adds three things to `snapshot_download`: whether the hub can be reached is known within seconds, its many
exceptions become one line each, and the hashes the hub publishes are handed on for comparison. Knows
nothing of the package index, and imports huggingface_hub on first use only.
"""

from __future__ import annotations

import fnmatch
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

from embedq.model.cache import disk_errors, is_disk_full, require_space
from embedq.model.errors import ModelDownloadError, ModelFormatError, ModelNotFoundError, ModelSourceError
from embedq.model.progress import Progress, folder_bytes, watching

#: What a sentence encoder is made of: no pickle, no other runtime's formats.
ALLOW_PATTERNS: Final = ["*.json", "*.safetensors", "*.txt"]
IGNORE_PATTERNS: Final = ["onnx/*", "openvino/*"]
#: Seconds for each step of the first request, and for all of it: resolving a name obeys no socket timeout.
PROBE_TIMEOUT_S: Final = 4.0
PROBE_DEADLINE_S: Final = 6.0
TRUE_WORDS: Final = {"1", "ON", "YES", "TRUE"}
#: huggingface_hub knows both, the second from older programs.
OFFLINE_SETTINGS: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
#: Of git's name for a blob, a SHA-1; a SHA-256 has 64.
GIT_ID_DIGITS: Final = 40

T = TypeVar("T")


class HubUnreachableError(ModelDownloadError):
    """No answer of a hub, as against its answer that it has no such model."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model in huggingface_hub's cache; `published` holds what the hub stated in this very call.

    By path: the SHA-256 of a large file, git's blob id of a small one.
    """

    path: Path
    commit: str
    published: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Listing:
    commit: str | None
    sizes: dict[str, int]
    published: dict[str, str]


def is_offline() -> bool:
    """As huggingface_hub says, but read at the call and not at an import."""
    return any(os.environ.get(name, "").upper() in TRUE_WORDS for name in OFFLINE_SETTINGS)


def cached_snapshot(repo_id: str, revision: str | None) -> Snapshot | None:
    """What huggingface_hub's cache holds, with no network."""
    hub = _import_hub()
    try:
        path = Path(_download(hub, repo_id, revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return Snapshot(path, path.name) if _is_whole(path) else None


def _is_whole(snapshot: Path) -> bool:
    """Whether the weights are all there: a transfer that broke off leaves a snapshot too."""
    try:
        shards = {
            index.parent / name
            for index in snapshot.rglob("*.safetensors.index.json")
            for name in json.loads(index.read_bytes())["weight_map"].values()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return any(snapshot.rglob("*.safetensors")) and all(shard.exists() for shard in shards)


def fetch_snapshot(repo_id: str, revision: str | None, progress: Progress) -> Snapshot:
    """Download what is missing of `repo_id`; where no hub answers, what its cache holds.

    Raises ModelNotFoundError (no such model or revision, or no access to it), ModelFormatError (no weights in
    safetensors), HubUnreachableError (no answer, or the transfer broke off), ModelDownloadError (no space).
    """
    hub = _import_hub()
    try:
        with _one_line_errors(hub, repo_id, revision):
            listing = _within(PROBE_DEADLINE_S, lambda: _list_files(hub, repo_id, revision))
    except HubUnreachableError:
        if snapshot := cached_snapshot(repo_id, revision):
            progress.note("the model hub cannot be reached: using the copy in its cache")
            return snapshot
        raise
    return _fetch_listed(hub, repo_id, revision, listing, progress)


def _fetch_listed(
    hub: ModuleType, repo_id: str, revision: str | None, listing: _Listing, progress: Progress
) -> Snapshot:
    with _one_line_errors(hub, repo_id, revision):
        if not any(path.endswith(".safetensors") for path in listing.sizes):
            raise ModelFormatError(
                f"{repo_id} has no .safetensors weights on the hub, and no other kind is loaded:"
                " look for a revision that has them, such as --revision refs/pr/1, or convert it once"
            )
        folder = _cache_folder(hub, repo_id)
        total_bytes = sum(listing.sizes.values())
        present_bytes = folder_bytes(folder / "blobs")
        require_space(folder, total_bytes - present_bytes, setting="HF_HOME")
        progress.start("download", total_bytes)
        with _bars_hidden(hub), watching(lambda: min(folder_bytes(folder / "blobs"), total_bytes), progress):
            path = Path(_download(hub, repo_id, revision, local_files_only=False))
        progress.update(total_bytes)
    # A branch may have moved on between the two requests: then the hashes are another commit's.
    return Snapshot(path, path.name, listing.published if listing.commit in {None, path.name} else {})


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as err:
        raise ModelSourceError(
            "fetching a model needs the package huggingface_hub: pip install 'embedq[worker]'"
        ) from err
    return huggingface_hub


def _list_files(hub: ModuleType, repo_id: str, revision: str | None) -> _Listing:
    # One request without retries: it says whether the hub is there, what it has, and the files' hashes.
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=PROBE_TIMEOUT_S)
    wanted = [entry for entry in info.siblings or [] if _is_wanted(entry.rfilename)]
    published = {entry.rfilename: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id for entry in wanted}
    return _Listing(
        commit=info.sha,
        sizes={entry.rfilename: entry.size or 0 for entry in wanted},
        published={path: digest for path, digest in published.items() if digest},
    )


def _is_wanted(path: str) -> bool:
    allowed = any(fnmatch.fnmatch(path, pattern) for pattern in ALLOW_PATTERNS)
    return allowed and not any(fnmatch.fnmatch(path, pattern) for pattern in IGNORE_PATTERNS)


def _download(hub: ModuleType, repo_id: str, revision: str | None, *, local_files_only: bool) -> str:
    path: str = hub.snapshot_download(
        repo_id,
        revision=revision,
        cache_dir=os.environ.get("HF_HUB_CACHE") or None,
        allow_patterns=ALLOW_PATTERNS,
        ignore_patterns=IGNORE_PATTERNS,
        endpoint=os.environ.get("HF_ENDPOINT") or None,
        local_files_only=local_files_only,
    )
    return path


def _cache_folder(hub: ModuleType, repo_id: str) -> Path:
    root = os.environ.get("HF_HUB_CACHE") or hub.constants.HF_HUB_CACHE
    return Path(root) / f"models--{repo_id.replace('/', '--')}"


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """`call()`, or TimeoutError. A late thread is left behind: nothing can interrupt a name's resolution."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as err:
            errors.append(err)

    thread = threading.Thread(target=run, name="embedq-hub-probe", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:.0f} s")
    return results[0]


@contextmanager
def _bars_hidden(hub: ModuleType) -> Iterator[None]:
    """Its own bars would draw over ours, and libraries stay silent."""
    hidden_before = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden_before:
            hub.utils.enable_progress_bars()


@contextmanager
def _one_line_errors(hub: ModuleType, repo_id: str, revision: str | None) -> Iterator[None]:
    try:
        with disk_errors(_cache_folder(hub, repo_id), setting="HF_HOME"):
            yield
    except ModelSourceError:
        raise
    except ModelFormatError:
        raise
    except hub.errors.HFValidationError as err:
        raise ModelNotFoundError(f"{repo_id!r} is neither a model's name (org/name) nor an existing folder") from err
    except hub.errors.HfHubHTTPError as err:
        raise _answer(hub, err, repo_id, revision) from err
    # The HTTP client below huggingface_hub has changed more than once, and its errors share no base.
    except Exception as err:
        if is_disk_full(err):
            raise ModelDownloadError(
                f"no space left for {repo_id}: free some, or set HF_HOME to a folder on another disk"
            ) from err
        raise HubUnreachableError(
            f"{repo_id} is not cached and the model hub cannot be reached ({_reason(err)}):"
            " check the network, proxy and HF_ENDPOINT, or pass the path of a model folder"
        ) from err


def _answer(hub: ModuleType, err: Any, repo_id: str, revision: str | None) -> ModelSourceError:
    status = err.response.status_code if err.response is not None else 0
    if isinstance(err, hub.errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo_id} has no revision {revision!r} on the hub: see its list of commits and tags"
        )
    if isinstance(err, hub.errors.GatedRepoError):
        return ModelNotFoundError(
            f"{repo_id} is gated: ask for access on its page of the hub, then set HF_TOKEN to a token of that account"
        )
    if isinstance(err, hub.errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the hub has no model {repo_id}, or it is private: check the spelling, or set HF_TOKEN"
            " to a token that may read it"
        )
    if status == 401:
        return ModelNotFoundError(f"the hub refuses HF_TOKEN for {repo_id} (401): set a valid token, or none")
    # A 404 without the hub's error code and a 403 are what proxies say, 429 and 5xx the hub's bad moments:
    # nothing of it is an answer about the model.
    return HubUnreachableError(
        f"no model hub answers, only {status} for {repo_id}: try again later, check proxy and HF_ENDPOINT,"
        " or pass the path of a model folder"
    )


def _reason(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:160] if lines else type(err).__name__
