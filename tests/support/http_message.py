"""Heads and bodies of HTTP/1.1 messages on a socket, as a proxy needs them (RFC 9112)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader

_PIECE_BYTES = 1 << 16


class ClosedError(Exception):
    """The other side ended the connection."""


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a request or an answer.

    Attributes:
        raw: All of it as it came, with the empty line at its end.
        words: The first line in three: method, path and version, or version, status and reason.
        headers: By lower-case name; of repeated ones the last.
    """

    raw: bytes
    words: tuple[str, str, str]
    headers: dict[str, str]

    @classmethod
    def read(cls, reader: BufferedReader) -> Head:
        """Read up to the empty line.

        Raises:
            ClosedError: The connection ends before.
        """
        lines = []
        while not lines or lines[-1] not in (b"\r\n", b"\n"):
            lines.append(reader.readline())
            if not lines[-1].endswith(b"\n"):
                raise ClosedError
        first, second, third = lines[0].decode("latin-1").rstrip().split(" ", 2)
        fields = [line.decode("latin-1").split(":", 1) for line in lines[1:-1]]
        headers = {name.strip().lower(): value.strip() for name, value in fields}
        return cls(b"".join(lines), (first, second, third), headers)

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks, each with its length."""
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def closes(self) -> bool:
        """Whether the connection is over after this message."""
        return self.headers.get("connection", "").lower() == "close" or "HTTP/1.0" in self.words

    def has_body(self, *, answers: str | None) -> bool:
        """Say whether a body follows.

        Args:
            answers: Method of the request that this answers; None if this is a request.
        """
        if answers is None:
            return self.is_chunked or self.headers.get("content-length", "0") != "0"
        return answers != "HEAD" and self.words[1] not in ("204", "304")

    def body(self, reader: BufferedReader) -> Iterator[bytes]:
        """Read the body in pieces, as they arrive and without the chunks' lengths.

        Raises:
            ClosedError: The connection ends before the body does.
        """
        if self.is_chunked:
            while size := int(reader.readline().split(b";")[0] or b"0", 16):
                yield from _pieces(reader, size)
                reader.readline()
            while reader.readline().strip():  # fields behind the last chunk
                pass
        elif "content-length" in self.headers:
            yield from _pieces(reader, int(self.headers["content-length"]))
        else:
            while piece := reader.read1(_PIECE_BYTES):
                yield piece

    def framed(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Put a body's pieces as they go over the wire under this head."""
        for piece in pieces:
            yield b"%x\r\n%b\r\n" % (len(piece), piece) if self.is_chunked else piece
        if self.is_chunked:
            yield b"0\r\n\r\n"


def _pieces(reader: BufferedReader, size: int) -> Iterator[bytes]:
    while size:
        piece = reader.read1(min(size, _PIECE_BYTES))
        if not piece:
            raise ClosedError
        size -= len(piece)
        yield piece
