"""The journal of what a run tells its tracker: written down first, sent beside training.

    <home>/tracking/<run>/<identity>/000000000007-00002-000003.jsonl    on this machine, at once
    <store>/<run>/tracking/<identity>/000000000007-00002-000003.jsonl   while the tracker is away

A segment is named after launch, attempt and number, so that all of a run have one order. It goes
when MLflow has all of it. What a process that died has left is sent by whoever comes next: the next
attempt, the driver at the end, the next launch, or `python -m trainer.track ship`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.documents import DocumentError, read_bounded
from trainer.metrics.entry import Entry
from trainer.metrics.tracker import MAX_POINTS, Point
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

        The numbers of launches begin anew when somebody deletes the run's folder in the store, so
        what a higher number has left comes first. What a process with a higher number writes now,
        to which this one has lost the run, is left to it.

        Raises:
            StoreError: The store fails.
        """
        names = self._place.names()
        with self._lock:
            earlier = [
                _Segment(name=name, entries=None, is_on_disk=not stored, is_in_store=stored)
                for name, stored in names.items()
                if name < self._writer
                or (self._is_of_before(name) and not _is_written(self._place.folder / name))
            ]
            earlier.sort(key=lambda segment: (not self._is_of_before(segment.name), segment.name))
            self._segments = [*earlier, *self._segments]

    def _is_of_before(self, name: str) -> bool:
        """Tell whether a segment seems to be of before the numbers of launches began anew."""
        return name > self._writer and not name.startswith(f"{self._writer}-")

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
            before = "0-" if self._is_of_before(head.name) else ""  # less than any number
            return f"{before}{head.name.removesuffix(_SUFFIX)}-{head.sent:06d}"

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

    def is_long(self) -> bool:
        """Tell whether this machine alone may have more points than a checkpoint takes along."""
        with self._lock:
            unsafe = sum(not each.is_in_store for each in self._segments)
        return unsafe * _MAX_ENTRIES > MAX_POINTS

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
            with suppress(OSError):  # not all file systems know locks
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _is_written(path: Path) -> bool:
    """Tell whether a process has a segment open to write, on this machine."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # the store alone has it, or its file system knows no locks
    return False


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
