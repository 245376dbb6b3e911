"""What can go wrong with an HTTP request, for `tests.support.faulty_proxy`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The store answers with an error, and the request does not reach it."""

    status: int = 503
    code: str = "SlowDown"

    def as_bytes(self, *, method: str) -> bytes:
        """The answer to a request of that method."""
        body = f"<?xml version='1.0'?><Error><Code>{self.code}</Code></Error>".encode()
        head = (
            f"HTTP/1.1 {self.status} Injected\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else body)


@dataclass(frozen=True)
class Silence:
    """A black hole: the connection stays open and no answer ever comes."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The connection ends after some bytes of the answer's body."""

    after_bytes: int

    def spoil(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        left = self.after_bytes
        for piece in pieces:
            if len(piece) >= left:
                yield piece[:left]
                raise ConnectionAbortedError
            left -= len(piece)
            yield piece


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One bit of the answer's body changes on the way."""

    at_byte: int = 0

    def spoil(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        start = 0
        for piece in pieces:
            place = self.at_byte - start
            start += len(piece)
            if 0 <= place < len(piece):
                yield piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
            else:
                yield piece


@dataclass(frozen=True, kw_only=True)
class Drip:
    """The answer's body comes slowly, in ten small pieces a second."""

    bytes_per_s: int

    def spoil(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        step = max(1, self.bytes_per_s // 10)
        for piece in pieces:
            for start in range(0, len(piece), step):
                time.sleep(step / self.bytes_per_s)
                yield piece[start : start + step]


@dataclass(frozen=True)
class Held:
    """The request waits for something before it goes on."""

    wait: Callable[[], object]


Fault = Answer | Silence | Cut | Flip | Drip | Held
