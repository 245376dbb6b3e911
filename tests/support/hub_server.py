"""A server of datasets as on the Hugging Face Hub, as far as its library asks for their files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef" * 2 + "01234567"
_FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(/tree|/paths-info|/revision)?(/.*)?")

Repositories = Mapping[str, Mapping[str, bytes]]
"""For each name of a dataset, its files."""


@contextmanager
def serve(repositories: Repositories) -> Iterator[str]:
    """Serve datasets; gives the address for HF_ENDPOINT."""

    class Handler(_Handler):
        served = repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Repositories

    def do_GET(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if file := _FILE.fullmatch(path):
            self._send_file(self.served.get(file[1], {}).get(file[2]))
        elif (call := _API.fullmatch(path)) and call[1] in self.served:
            files = self.served[call[1]]
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)[:40]}
                for name, data in files.items()
            ]
            if call[2] == "/paths-info":
                wanted = parse_qs(asked.decode()).get("paths", [])
                self._send_json([each for each in entries if each["path"] in wanted])
            elif call[2] == "/tree":
                _, _, below = (call[3] or "").removeprefix("/").partition("/")
                found = [each for each in entries if str(each["path"]).startswith(below)]
                self._send_json(found)
            else:
                siblings = [{"rfilename": name} for name in files]
                self._send_json({"id": call[1], "sha": REVISION, "siblings": siblings})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def _send_file(self, data: bytes | None) -> None:
        told = {"X-Repo-Commit": REVISION}
        if data is None:
            self._send(404, b"", {**told, "X-Error-Code": "EntryNotFound"})
            return
        told["etag"] = f'"{_digest(data)}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            told["Content-Range"] = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
            self._send(206, data[begin:end], told)
        else:
            self._send(200, data, told)

    def _send_json(self, values: object) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command in ("GET", "POST"):
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
