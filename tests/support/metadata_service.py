"""A server that answers like EC2's instance metadata service, version 2: to who has a token."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Instance(ThreadingHTTPServer):
    """The service of one instance.

    Attributes:
        notice: What it says about its end; None if it stays.
        tokens: The tokens that it takes.
        asked: The requests, each a method, a path and the code of the answer.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.notice: bytes | None = None
        self.tokens: list[str] = []
        self.asked: list[tuple[str, str, int]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def announce(self, action: str, at: float) -> None:
        """Say that the instance goes, at a time in seconds since 1970."""
        when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.notice = json.dumps({"action": action, "time": when}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Instance

    def do_PUT(self) -> None:
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token":
            self._answer(403)
        elif not (lifetime.isdecimal() and 1 <= int(lifetime) <= 21600):
            self._answer(400)
        else:
            self.server.tokens.append(secrets.token_urlsafe(40))
            self._answer(200, self.server.tokens[-1].encode())

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            self._answer(401)
        elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            self._answer(404)
        else:
            self._answer(200, self.server.notice)

    def _answer(self, code: int, content: bytes = b"") -> None:
        assert self.command
        self.server.asked.append((self.command, self.path, code))
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def metadata_service(port: int = 0) -> Iterator[Instance]:
    """Have it for the length of a `with` block; on any port, unless one is given."""
    with Instance(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
