"""A server on loopback with the part of the Hugging Face Hub's API that reading needs, with faults.

Tests use it through huggingface_hub's own client. Paths and fields follow the Hub's public API
(https://huggingface.co/docs/hub/api) and the requests of that client.
"""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

HOST = "127.0.0.1"
_COMMIT = {"id": "0" * 40, "title": "files", "date": "2026-01-01T00:00:00.000Z"}


class Hub(ThreadingHTTPServer):
    """Serves `files` (path -> bytes; may be changed at any time) as the data set `repository`.

    `fault` is called with the number of each request, from 0, and returns None, "503" or "stop" (the body
    ends half way). When `token` is set, requests without it get the answer for a missing data set.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__((HOST, 0), _Handler)
        self.repository, self.files = repository, dict(files)
        self.token: str | None = None
        self.fault: Callable[[int], str | None] = lambda number: None
        self.faults: list[str] = []
        self.num_requests = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"

    def entries(self, folder: str) -> list[dict[str, Any] | None]:
        """Return the files and folders directly in a folder ("" for the root)."""
        names = {PurePosixPath(path) for path in self.files}
        names |= {parent for path in names for parent in path.parents}
        return [
            self.entry(str(path))
            for path in sorted(names)
            if path.name and path.parent == PurePosixPath(folder)
        ]

    def entry(self, path: str) -> dict[str, Any] | None:
        """Return what the Hub says about a path, None when nothing is there."""
        if path in self.files:
            data = self.files[path]
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return {"type": "file", "path": path, "size": len(data), "oid": oid, "lastCommit": _COMMIT}
        if any(file.startswith(path + "/") for file in self.files):
            oid = hashlib.sha1(path.encode()).hexdigest()
            return {"type": "directory", "path": path, "size": 0, "oid": oid, "lastCommit": _COMMIT}
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault == "stop" and len(body) > 10:
            self.server.faults.append("stop")
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _serve(self) -> None:
        with self.server.lock:
            self._fault = self.server.fault(self.server.num_requests)
            self.server.num_requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._fault == "503":
            self.server.faults.append("503")
            return self._answer(503)
        token = self.server.token
        path, hub = unquote(urlsplit(self.path).path), self.server
        api, file = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/main/"
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            return self._answer(401, X_Error_Code="RepoNotFound")
        if path in (api, f"{api}/revision/main"):
            return self._json({"id": hub.repository, "sha": _COMMIT["id"], "siblings": []})
        if path.startswith(f"{api}/tree/main"):
            folder = path.removeprefix(f"{api}/tree/main").strip("/")
            if folder and (hub.entry(folder) or {}).get("type") != "directory":
                return self._answer(404, X_Error_Code="EntryNotFound")
            return self._json(hub.entries(folder))
        if path == f"{api}/paths-info/main":
            paths = parse_qs(body.decode())["paths"]
            return self._json([entry for entry in map(hub.entry, paths) if entry])
        if path.startswith(file) and path.removeprefix(file) in hub.files:
            return self._file(hub.files[path.removeprefix(file)])
        code = "EntryNotFound" if path.startswith((file, f"{api}/")) else "RepoNotFound"
        return self._answer(404, X_Error_Code=code)

    def _file(self, data: bytes) -> None:
        byte_range = self.headers.get("Range")
        if not byte_range:
            return self._answer(200, data)
        first, _, last = byte_range.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= end:
            return self._answer(416)
        return self._answer(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")

    do_GET = do_HEAD = do_POST = _serve

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_server(repository: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """Run the server for the body."""
    hub = Hub(repository, files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def environment(hub: Hub, patience_s: float = 30) -> dict[str, str]:
    """Return environment variables with which a new process uses the server for `hf://`."""
    return {"HF_ENDPOINT": hub.url, "VICO_REMOTE_PATIENCE_S": str(patience_s), "HF_HUB_DISABLE_XET": "1"}
