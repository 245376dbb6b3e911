"""The journal of what a run tells its tracker: written down first, sent beside training.

    <home>/tracking/<run>/<identity>/000000000007-00002-000003.jsonl    on this machine, at once
    <store>/<run>/tracking/<identity>/000000000007-00002-000003.jsonl   while the tracker is away

A segment is named after launch, attempt and number, so that all of a run have one order. It goes
when MLflow has all of it. What a process that died has left is sent by whoever comes next: the next
attempt, the driver at the end, the next launch, or `python -m trainer.track ship`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.documents import DocumentError, parse_json, read_bounded, validate_as
from trainer.metrics.tracker import MAX_POINTS, Point, by_protocol
from trainer.storage.errors import MissingObject, StoreError
from trainer.storage.store import Store

_log = logging.getLogger(__name__)

FOLDER = "tracking"
_SUFFIX = ".jsonl"
_MAX_ENTRIES = 500
_ROTATE_BYTES = 4 << 20
_MAX_BYTES = 1 << 28
_NEW = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class JournalUnreadable(StoreError):
    """A part of the journal is on this machine, which does not read it; trying later may help."""


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


@dataclass(frozen=True, kw_only=True)
class JournalPlace:
    """Where the journal of a run is.

    Attributes:
        folder: On this machine.
        store: Where it is kept while the tracker is away.
        prefix: What its keys there begin with.
    """

    folder: Path
    store: Store
    prefix: str

    @classmethod
    def of(cls, home: Path, store: Store, *, run: str, identity: str) -> JournalPlace:
        """Return the place of a run's journal in a home and a store of runs."""
        return cls(
            folder=home / FOLDER / run / identity,
            store=store,
            prefix=f"{run}/{FOLDER}/{identity}/",
        )

    def names(self) -> dict[str, bool]:
        """Return the segments that there are, in their order, and whether the store has them.

        Raises:
            StoreError: The store fails.
        """
        found = {path.name: False for path in self.folder.glob(f"[0-9]*{_SUFFIX}")}
        for key in self.store.list(self.prefix):
            name = key.removeprefix(self.prefix)
            if name.endswith(_SUFFIX):
                found[name] = True
        return dict(sorted(found.items()))


def identities(home: Path, store: Store, *, run: str) -> list[str]:
    """Return of which trainings under a run's name there is a journal, in the order of launches.

    Raises:
        StoreError: The store fails.
    """
    first: dict[str, str] = {}
    prefix = f"{run}/{FOLDER}/"
    keys = [key.removeprefix(prefix) for key in store.list(prefix)]
    keys += [str(path.relative_to(home / FOLDER / run)) for path in _local(home / FOLDER / run)]
    for identity, _, name in (key.partition("/") for key in keys):
        if name.endswith(_SUFFIX):
            first[identity] = min(name, first.get(identity, name))
    return sorted(first, key=lambda identity: first[identity])


def _local(folder: Path) -> list[Path]:
    return list(folder.glob(f"*/*{_SUFFIX}"))


@dataclass(kw_only=True, eq=False)
class _Segment:
    """A part of the journal.

    Attributes:
        name: Its name, also its place in the order.
        entries: What it holds, as long as that is in memory; of an own one it may be on disk alone.
        is_on_disk: Whether all of it is in the folder.
        is_in_store: Whether all of it is in the store.
        is_closed: Whether nothing more comes.
        sent: How many of its entries have arrived.
    """

    name: str
    entries: list[Entry] | None
    is_on_disk: bool = True
    is_in_store: bool = False
    is_closed: bool = True
    sent: int = 0


class Journal:
    """What one process tells, after what others of its run have left.

    `append` and `rotate` are for the thread that trains, the rest for the one that sends.

    Args:
        place: Where it is.
        writer: Names the process in the order of all that write: launch and attempt.
        address: What tells a later reader where it was to go.
    """

    def __init__(self, place: JournalPlace, *, writer: str, address: Entry) -> None:
        self._place = place
        self._writer = writer
        self._address = address
        self._segments: list[_Segment] = []
        self._number = 0
        self._descriptor: int | None = None
        self._bytes = 0
        self._disk_failed = False
        self._lock = threading.Lock()
        self._storing = threading.Lock()

    def append(self, entry: Entry) -> None:
        """Take an entry down; it survives this process if the disk takes it, which never raises."""
        line = entry.to_line()
        with self._lock:
            segment = self._own() or self._begin()
            assert segment.entries is not None
            segment.entries.append(entry)
            self._write(segment, line)
            if len(segment.entries) >= _MAX_ENTRIES or self._bytes >= _ROTATE_BYTES:
                self._end(segment)

    def rotate(self) -> None:
        """End the segment that is being written, so that the store can take it."""
        with self._lock:
            if segment := self._own():
                self._end(segment)

    def find_earlier(self) -> None:
        """Put what others of the run have left before what this process tells.

        Raises:
            StoreError: The store fails.
        """
        names = self._place.names()
        with self._lock:
            earlier = [
                _Segment(name=name, entries=None, is_on_disk=not stored, is_in_store=stored)
                for name, stored in names.items()
                if name < self._writer
            ]
            self._segments = [*earlier, *self._segments]

    def waiting(self, most: int) -> list[Entry]:
        """Return the oldest entries that have not arrived, of one segment.

        Args:
            most: How many at most.

        Raises:
            StoreError: They cannot be read, on this machine or in the store that alone has them.
        """
        while True:
            with self._lock:
                head = self._segments[0] if self._segments else None
            if head is None:
                return []
            entries = self._load(head)
            with self._lock:
                head.entries = entries
                part = entries[head.sent : head.sent + most]
            if part or not head.is_closed:
                return part
            self._remove(head)

    def position(self) -> str:
        """Return the place of the oldest entry that waits among all that the run ever tells.

        Texts of later ones are greater, whatever the clocks of the machines say.
        """
        with self._lock:
            head = self._segments[0]
            return f"{head.name.removesuffix(_SUFFIX)}-{head.sent:06d}"

    def arrived(self, count: int) -> None:
        """Forget the oldest entries."""
        with self._lock:
            head = self._segments[0]
            head.sent += count
            is_done = head.is_closed and head.sent >= len(head.entries or ())
        if is_done:
            self._remove(head)

    def store_closed(self) -> None:
        """Have the store take what is waiting and whole.

        Raises:
            StoreError: The store fails, or something of it cannot be read.
        """
        unreadable: JournalUnreadable | None = None
        with self._storing:
            with self._lock:
                mine = [each for each in self._segments if each.is_closed and not each.is_in_store]
            for segment in mine:
                try:
                    entries = self._load(segment)
                except JournalUnreadable as error:  # the others need not wait for it
                    unreadable = error
                    continue
                if entries:
                    content = b"".join(each.to_line() for each in entries)
                    self._place.store.put(self._place.prefix + segment.name, content)
                    segment.is_in_store = True
        if unreadable is not None:
            raise unreadable

    def unsafe_points(self) -> list[Point]:
        """Return the newest points that neither the tracker nor the store has, oldest first.

        A checkpoint takes them along, which a segment that cannot be read now does not fail.
        """
        points: list[Point] = []
        with self._lock:
            segments = [each for each in self._segments if not each.is_in_store]
        for segment in segments:
            try:
                waiting = self._load(segment)[segment.sent :]
            except StoreError as error:
                _log.warning("a checkpoint does not take along what is there: %s", error)
                continue
            points += [each.point() for each in waiting if each.kind in ("points", "measured")]
        return points[-MAX_POINTS:]

    def newest_address(self) -> dict[str, str]:
        """Return where the newest of what is there was to go; nothing if none of it tells so.

        Raises:
            StoreError: It cannot be read.
        """
        for segment in reversed(self._segments):
            for entry in self._load(segment):
                if entry.kind == "address":
                    return entry.values
        return {}

    def count(self) -> int:
        """Return how many entries wait, at least."""
        with self._lock:
            return sum(max(1, len(each.entries or ()) - each.sent) for each in self._segments)

    def _own(self) -> _Segment | None:
        newest = self._segments[-1] if self._segments else None
        return None if newest is None or newest.is_closed else newest

    def _begin(self) -> _Segment:
        self._number += 1
        name = f"{self._writer}-{self._number:06d}{_SUFFIX}"
        segment = _Segment(name=name, entries=[], is_closed=False)
        self._segments.append(segment)
        self._bytes = 0
        try:
            self._place.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._place.folder / name, _NEW, 0o644)
        except OSError as error:
            self._lose_disk(segment, error)
        assert segment.entries is not None
        segment.entries.append(self._address)
        self._write(segment, self._address.to_line())
        return segment

    def _write(self, segment: _Segment, line: bytes) -> None:
        self._bytes += len(line)
        if self._descriptor is None:
            return
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError("its disk is full")
        except OSError as error:
            self._lose_disk(segment, error)

    def _lose_disk(self, segment: _Segment, error: OSError) -> None:
        """Go on in memory: the next segment tries the disk again."""
        segment.is_on_disk = False
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if not self._disk_failed:
            _log.warning(
                "what is told to MLflow is kept in memory alone, as %s cannot be written: %s",
                self._place.folder,
                error.strerror or error,
            )
        self._disk_failed = True

    def _end(self, segment: _Segment) -> None:
        segment.is_closed = True
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if segment.is_on_disk and segment is not self._segments[0]:
            segment.entries = None

    def _load(self, segment: _Segment) -> list[Entry]:
        """Return what a segment holds; nothing if it has gone.

        Raises:
            JournalUnreadable: It is there, and cannot be read.
            StoreError: The store fails.
        """
        if (entries := segment.entries) is not None:
            return entries
        path = self._place.folder / segment.name
        try:
            return _entries(read_bounded(path, max_bytes=_MAX_BYTES), of=str(path))
        except FileNotFoundError:
            pass  # the store has it, or somebody else has sent it
        except (OSError, DocumentError) as error:
            if not segment.is_in_store:
                raise JournalUnreadable(
                    f"{path} cannot be read ({error}); what follows waits for it. If that does "
                    "not pass, make it readable, or move it away, which gives up what it holds"
                ) from error
        if not segment.is_in_store:
            return []
        key = self._place.prefix + segment.name
        try:
            content = self._place.store.get_range(key, 0, _MAX_BYTES)
        except MissingObject:
            return []
        return _entries(content, of=self._place.store.uri(key))

    def _remove(self, segment: _Segment) -> None:
        """Forget a segment that has arrived."""
        with self._storing:
            with self._lock:
                if segment in self._segments:
                    self._segments.remove(segment)
            with suppress(OSError):
                (self._place.folder / segment.name).unlink(missing_ok=True)
                if not self._segments:
                    self._place.folder.rmdir()
                    self._place.folder.parent.rmdir()
            if segment.is_in_store:
                with suppress(StoreError):  # sent once more later, it changes nothing
                    self._place.store.delete(self._place.prefix + segment.name)


def _entries(content: bytes, *, of: str) -> list[Entry]:
    """Read a segment, leaving out what is damaged: the process may have died while it wrote."""
    entries, damaged = [], 0
    for line in content.splitlines():
        try:
            entries.append(Entry.from_line(line))
        except DocumentError:
            damaged += 1
    if damaged:
        _log.warning("%d of %d entries of %s are damaged", damaged, damaged + len(entries), of)
    return entries


def recorded_address(place: JournalPlace) -> dict[str, str]:
    """Return where the newest segment of a journal was to go; nothing if none tells so.

    Raises:
        StoreError: The store fails.
    """
    journal = Journal(place, writer="~", address=Entry(kind="address", time_ms=0))
    journal.find_earlier()
    return journal.newest_address()
