"""What was verified when a model was fetched: `embedq-manifest.json`.

Full hashing happens once, at the fetch; later loads compare sizes with the manifest, which costs microseconds
instead of a second per 400 MB. Knows nothing of where the files came from beyond the words it stores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

MANIFEST_FILE: Final = "embedq-manifest.json"
#: Raised when the file's meaning changes; a manifest of another format is as good as none.
MANIFEST_FORMAT: Final = 1
CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files` is keyed by the path inside `folder`, with forward slashes."""

    name: str
    revision: str
    #: `hub` or `package-index`
    source: str
    folder: Path
    files: Mapping[str, FileRecord]

    def sizes_match(self) -> bool:
        return all(_size(self.folder / path) == record.bytes for path, record in self.files.items())

    def write(self, into: Path) -> None:
        """Write `into`/embedq-manifest.json; files elsewhere (in the hub's own cache) are stored by path."""
        document = {
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "revision": self.revision,
            "source": self.source,
            "folder": None if self.folder == into else str(self.folder),
            "files": {path: asdict(record) for path, record in sorted(self.files.items())},
        }
        (into / MANIFEST_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is no manifest or it cannot be understood: the model is then fetched again."""
    try:
        document: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if document["format"] != MANIFEST_FORMAT:
            return None
        return Manifest(
            name=_text(document["name"]),
            revision=_text(document["revision"]),
            source=_text(document["source"]),
            folder=Path(document["folder"]) if document["folder"] else folder,
            files={path: FileRecord(**record) for path, record in document["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be a string, not {value!r}")
    return value


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256, read in chunks; `on_bytes` hears the size of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def git_blob_id(path: Path) -> str:
    """What git calls a file's content, and a hub publishes for small files; reads it whole."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
