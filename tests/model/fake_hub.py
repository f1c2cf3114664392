"""A model hub on 127.0.0.1: as much of its HTTP as huggingface_hub's `snapshot_download` needs, and its bad days."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """One model with some files. The switches below may be changed while it runs."""

    repo_id: str
    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    #: answer the API with this status and this X-Error-Code
    status: int = 200
    error_code: str | None = None
    #: send this many bytes of each large file, then close the connection
    cut_after: int | None = None
    #: serve other bytes of the same length for this file
    corrupt: str | None = None
    #: accept requests and never answer them
    hangs: bool = False
    released: threading.Event = field(default_factory=threading.Event)

    def siblings(self) -> list[dict[str, object]]:
        return [
            {"rfilename": path, "size": len(data), "blobId": git_oid(data), **self.lfs(path)}
            for path, data in self.files.items()
        ]

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": git_oid(data), **self.lfs(path)}
            for path, data in self.files.items()
        ]

    def lfs(self, path: str) -> dict[str, object]:
        if not is_large(path):
            return {}
        sha256, size = hashlib.sha256(self.files[path]).hexdigest(), len(self.files[path])
        return {"lfs": {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 134}}


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".onnx"))


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - the base class's name

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.hangs:
                hub.released.wait(30)
                self.close_connection = True
            elif hub.status != 200:
                self.refuse(hub.status, hub.error_code)
            elif path.startswith("/api/"):
                self.answer_api(path)
            else:
                self.answer_file(path.partition(f"/resolve/{COMMIT}/")[2], with_body=with_body)

        def refuse(self, status: int, error_code: str | None) -> None:
            self.send_response(status)
            if error_code:
                self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer_api(self, path: str) -> None:
            base = f"/api/models/{hub.repo_id}"
            if path == f"{base}/tree/{COMMIT}":
                self.send_json(hub.tree())
            elif path in {base, f"{base}/revision/main", f"{base}/revision/v1", f"{base}/revision/{COMMIT}"}:
                self.send_json({"id": hub.repo_id, "sha": COMMIT, "siblings": hub.siblings()})
            elif path.startswith(base):
                self.refuse(404, "RevisionNotFound")
            else:
                self.refuse(401, "RepoNotFound")

        def send_json(self, document: object) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer_file(self, path: str, *, with_body: bool) -> None:
            data = hub.files[path]
            etag = hashlib.sha256(data).hexdigest() if is_large(path) else git_oid(data)
            body = bytes(len(data)) if path == hub.corrupt else data
            first = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            if with_body and hub.cut_after is not None and is_large(path):
                self.wfile.write(body[first : hub.cut_after])
                self.close_connection = True
            elif with_body:
                self.wfile.write(body[first:])

    return Handler


@contextmanager
def running_hub(repo_id: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(repo_id, files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
