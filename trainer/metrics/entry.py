"""One thing that a run tells its tracker, as a line of the journal holds it."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pipelines.documents import DocumentError, parse_json, validate_as
from trainer.metrics.tracker import Point, by_protocol


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to tell, and when it happened.

    Attributes:
        kind: What it is.
        time_ms: When, in milliseconds since 1970.
        images: Its position of the run.
        name: Of a picture or a data set, of the metric to compare by; why a run has ended; "total"
            of points that are the last word.
        text: A picture or a file as base64, a document, a page, an address, a status.
        values: Metrics as hexadecimal floats, or texts by name.
        tags: More texts by name.
    """

    kind: Literal[
        "address",
        "begin",
        "settings",
        "tags",
        "dataset",
        "page",
        "report",
        "file",
        "points",
        "picture",
        "checkpoint",
        "measured",
        "runs",
        "end",
    ]
    time_ms: Annotated[int, Field(ge=0, lt=2**53)]
    images: Annotated[int, Field(ge=0, lt=2**63)] = 0
    name: str = ""
    text: str = ""
    values: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def is_total(self) -> bool:
        """Whether it has points that stand for the whole run so far, wherever their curves are."""
        return self.kind == "points" and self.name == "total"

    @property
    def is_for_another(self) -> bool:
        """Whether it is an end that is told for a process that may have told its own."""
        return self.kind == "end" and bool(self.values)

    @property
    def protocol(self) -> str:
        """How the figures of `values` were measured; "" if nothing tells."""
        return self.tags.get("protocol", "") if self.kind == "page" else self.text

    def to_line(self) -> bytes:
        """Return it as a line that carries its own checksum."""
        told = {key: value for key, value in asdict(self).items() if value not in ("", 0, {})}
        body = json.dumps({"time_ms": self.time_ms, **told}, separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(body), body)

    @classmethod
    def from_line(cls, line: bytes) -> Entry:
        """Read a line of `to_line`.

        Raises:
            DocumentError: It is damaged.
        """
        checksum, _, body = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            raise DocumentError("its checksum does not fit")
        entry: Entry = validate_as(cls, parse_json(body))
        if entry.kind in ("points", "measured", "page"):
            entry.point()
        return entry

    def point(self) -> Point:
        """Return the point that it tells, of what was measured by its protocol.

        Raises:
            DocumentError: Its values are no numbers.
        """
        try:
            point = Point.from_json([self.images, self.values])
        except (ValueError, OverflowError) as error:
            raise DocumentError(f"its values are no numbers ({error})") from None
        if self.kind == "points":
            return point
        return point._replace(values=by_protocol(point.values, self.protocol))
