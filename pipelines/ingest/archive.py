"""The files in an uncompressed tar archive, as ranges of its bytes.

Python's own reader takes a damaged header for the end, so that a flipped bit loses all that comes
behind it. Here an archive has to end as one does: in two blocks of zeros, and no more than fill up
a record. Nothing in it is unpacked, and no size in it is believed before it was compared with the
size of the file.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipelines.errors import UnreadableSourceError
from pipelines.ingest.entry import Entry, Wanted, is_hidden

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_MAX_END_BYTES = len(_END) + 20 * _BLOCK  # tar fills its last record, of 20 blocks, with zeros
_MAX_HEADER_BYTES = 1 << 20  # of a long name, or of extended attributes
_MAX_NESTED = 3


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Where an archive lies.

    Attributes:
        path: The file.
        parts: The folder that it counts as.
        start: Its first byte: not 0 for an archive inside another one.
        size: Number of its bytes.
        modified_ns: When the file was changed last.
        nested: In how many archives it lies.
    """

    path: Path
    parts: tuple[str, ...]
    start: int
    size: int
    modified_ns: int
    nested: int = 0

    @property
    def place(self) -> str:
        """What to call it in messages."""
        return f"{self.path}, from byte {self.start} on," if self.nested else f"{self.path}"


def walk_archive(archive: Archive, *, wanted: Wanted) -> Iterator[Entry]:
    """Find the files in an archive, in the archives in it too.

    As in unpacking, the last one of several members of one name counts, and a hard link is the
    member that it names. Symbolic links are passed over.

    Raises:
        OSError: It cannot be read.
        UnreadableSourceError: It is damaged, cut short, compressed or no archive.
    """
    if archive.nested > _MAX_NESTED:
        raise UnreadableSourceError(
            f"{archive.path} holds archives in archives, more than {_MAX_NESTED} deep. Unpack the "
            "outer ones, and give the folder."
        )
    found: dict[tuple[str, ...], Entry] = {}
    folders: set[tuple[str, ...]] = set()
    with archive.path.open("rb") as file:
        for member in _members(_Span(file, start=archive.start, size=archive.size), archive):
            parts = _parts(member.name)
            entry = _entry(member, parts, found, archive=archive, wanted=wanted)
            if not entry:
                folders.add(parts)
                continue
            if entry.parts in found and entry.passed_over != "hidden folder":
                yield replace(
                    entry, parts=(*archive.parts, *entry.parts), passed_over="replaced file"
                )
            found[entry.parts] = entry
    for entry in found.values():
        if wanted.archives and entry.passed_over == ".tar":
            yield from walk_archive(
                Archive(
                    path=archive.path,
                    parts=(*archive.parts, *entry.parts[:-1], PurePosixPath(entry.parts[-1]).stem),
                    start=entry.offset,
                    size=entry.size,
                    modified_ns=archive.modified_ns,
                    nested=archive.nested + 1,
                ),
                wanted=wanted,
            )
        else:
            yield replace(entry, parts=(*archive.parts, *entry.parts))
    filled = {parts[:end] for parts in (*found, *folders) for end in range(len(parts))}
    for parts in sorted(folders - filled):
        yield Entry(parts=(*archive.parts, *parts), path=archive.path, passed_over="empty folder")


def _entry(
    member: tarfile.TarInfo,
    parts: tuple[str, ...],
    found: dict[tuple[str, ...], Entry],
    *,
    archive: Archive,
    wanted: Wanted,
) -> Entry | None:
    """Say what a member is; None for a folder."""
    hidden = next((end for end, part in enumerate(parts[:-1], 1) if is_hidden(part)), 0)
    if hidden or (member.isdir() and parts and is_hidden(parts[-1])):
        return Entry(parts=parts[: hidden or None], path=archive.path, passed_over="hidden folder")
    if member.isdir():
        return None
    if not parts:  # as a damaged extension header leaves it
        return Entry(parts=("",), path=archive.path, passed_over="file without a name")
    offset, size = archive.start + member.offset_data, member.size
    linked = found.get(_parts(member.linkname)) if member.islnk() else None
    if linked and not linked.passed_over:
        offset, size = linked.offset, linked.size
        why_not = wanted.why_not(parts[-1], size)
    elif member.islnk() or member.issym():
        why_not = "linked file"
    elif member.issparse():  # its bytes do not lie in one stretch, and may be any number
        why_not = "sparse file"
    elif member.isreg():
        why_not = wanted.why_not(parts[-1], size)
    else:
        why_not = "special file"
    return Entry(
        parts=parts,
        path=archive.path,
        offset=offset,
        size=size,
        modified_ns=archive.modified_ns,
        passed_over=why_not,
    )


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part != "/")


class _Span:
    """A stretch of a file, read as a file of its own: only as far as it goes, in small pieces."""

    def __init__(self, file: BinaryIO, *, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._at = 0
        self.size = size

    def tell(self) -> int:
        return self._at

    def seek(self, place: int) -> int:
        if place < 0:
            raise tarfile.ReadError("a member of negative size")
        self._at = place
        return place

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(count, self.size - self._at)))
        self._at += len(content)
        return content


def _members(span: _Span, archive: Archive) -> Iterator[tarfile.TarInfo]:
    """Read the headers one after the other, up to the end of the archive.

    Raises:
        UnreadableSourceError: It is damaged, cut short, compressed or no archive.
    """
    end = 0
    try:
        with tarfile.open(fileobj=span, mode="r:") as reader:  # type: ignore[call-overload]
            while (member := reader.next()) is not None:
                if not end < reader.offset <= span.size:
                    raise tarfile.ReadError("unexpected end of data")
                end = reader.offset
                reader.members.clear()  # which it would collect
                yield member
            end = reader.offset
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UnreadableSourceError(
            f"{archive.place} is an archive that cannot be read ({error}). Only uncompressed .tar "
            "archives are read in place, and only whole: fetch it again, or unpack it and give the "
            "folder."
        ) from error
    fault = _fault_of_end(span, end)
    if fault:
        raise UnreadableSourceError(
            f"{archive.place} is a damaged archive: {fault}. Files would be missing, so nothing "
            "was written. Fetch it again; or, if it has to be so, unpack it and give the folder."
        )


def _fault_of_end(span: _Span, end: int) -> str:
    """Say what is wrong with how an archive ends; nothing if it is whole.

    Args:
        span: Its bytes.
        end: Where the first header is that was not taken for one.
    """
    span.seek(end)
    rest = span.size - end
    tail = span.read(min(rest, _MAX_END_BYTES))
    if any(tail[:_BLOCK]):
        return f"the header at byte {end} is damaged"
    if any(tail):
        return f"there is data behind its end at byte {end}"
    if rest < len(_END):
        return f"it was cut at byte {span.size}, for its end marker is missing"
    if rest > _MAX_END_BYTES:
        return f"{rest:,} zeros follow on byte {end}, more than tar writes"
    return ""
