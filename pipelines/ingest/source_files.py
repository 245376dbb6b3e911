"""The files of a source: what is taken of them, and why others are passed over.

A source is a folder, or an archive, which counts as a folder of its name. Both are walked to the
same entries, so that it makes no difference whether images lie packed or unpacked. An archive is an
uncompressed tar, whose files are ranges of its bytes. Python's own reader takes a damaged header
for the end, so that a flipped bit loses all that comes behind it. Here an archive has to end as one
does: in two blocks of zeros, and no more than fill up a record. Nothing in it is unpacked, and no
size in it is believed before it was compared with the size of the file.
"""

import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipelines.errors import UnreadableSourceError

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_MAX_END_BYTES = len(_END) + 20 * _BLOCK  # tar fills its last record, of 20 blocks, with zeros
_MAX_HEADER_BYTES = 1 << 20  # of a long name, or of extended attributes
_MAX_NESTED = 3
_MAX_NAME = 4095  # characters; as long as a path may be
_MAX_PARTS = 128
_PLAIN_SUFFIX = re.compile(r"(\.tar)?\.[a-z0-9_-]{1,12}")
# What systems and tools leave beside images, next to everything whose name begins with a dot.
_TOOL_FOLDERS = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
)

PassedOver = tuple[tuple[str, int], ...]
"""How many files there are of each kind that is not taken, the most frequent first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of a source, or a folder of it that is not looked into.

    Attributes:
        parts: Its folders and its name, from the source on.
        path: File that holds its bytes.
        offset: First byte there.
        size: Number of bytes.
        modified_ns: When the file that holds it was changed last.
        passed_over: Kind of thing that is not taken, such as ".bmp"; empty for what is.
    """

    parts: tuple[str, ...]
    path: Path
    offset: int = 0
    size: int = 0
    modified_ns: int = 0
    passed_over: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which files are looked for.

    Attributes:
        suffixes: Ends of their names, in lower case.
        max_bytes: Size above which one is passed over, for it is read as a whole.
        archives: Whether .tar archives are looked into.
    """

    suffixes: tuple[str, ...]
    max_bytes: int = sys.maxsize
    archives: bool = True

    def why_not(self, name: str, size: int) -> str:
        """Say why a regular file is passed over; nothing if it is wanted."""
        if is_hidden(name):
            return "hidden file"
        if PurePosixPath(name).suffix.lower() not in self.suffixes:
            return _kind(name)
        return "" if size <= self.max_bytes else "oversized file"


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is none of the data, by its name."""
    return name.startswith(".") or name in _TOOL_FOLDERS


def _kind(name: str) -> str:
    path = PurePosixPath(name)
    packed = path.suffixes[-2:-1] == [".tar"]  # as in .tar.gz
    suffix = "".join(path.suffixes[-2:] if packed else path.suffixes[-1:]).lower()
    return suffix if _PLAIN_SUFFIX.fullmatch(suffix) else "other file"


def count(kinds: Iterable[str]) -> PassedOver:
    """Count what is passed over."""
    return tuple(sorted(Counter(kinds).items(), key=lambda pair: (-pair[1], pair[0])))


def in_words(passed_over: PassedOver) -> str:
    """List what is passed over, as in "6 .bmp, 1 linked folder"."""
    return ", ".join(
        f"{number:,} {kind}{'' if number == 1 or kind.startswith('.') else 's'}"
        for kind, number in passed_over
    )


@dataclass(frozen=True)
class _Folder:
    """A folder that is looked into.

    Attributes:
        path: Where it is.
        parts: Its folders and its name, from the source on.
        above: The folders on the way there, without links; a link to one of them is a circle.
    """

    path: Path
    parts: tuple[str, ...]
    above: tuple[Path, ...]


def walk(source: Path, *, wanted: Wanted, follow_links: bool = False) -> Iterator[Entry]:
    """Find the files in a source.

    Args:
        source: A folder, or a .tar archive.
        wanted: Which of them are looked for; the others are told as passed over.
        follow_links: Take symbolic links for what they name, wherever that is. Without, they are
            passed over: data from elsewhere must not reach files beside it.

    Raises:
        OSError: Something cannot be read.
        UnreadableSourceError: An archive is damaged.
    """
    if source.is_file():
        yield from _in_archive(source, (), wanted)
        return
    waiting = [_Folder(source, (), (source.resolve(),))]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder.path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        if not entries and folder.parts:
            yield Entry(parts=folder.parts, path=folder.path, passed_over="empty folder")
        for entry in entries:
            parts, path = (*folder.parts, entry.name), Path(entry.path)
            if not entry.is_dir():
                yield from _file(entry, parts, wanted, follow_links=follow_links)
            elif is_hidden(entry.name):
                yield Entry(parts=parts, path=path, passed_over="hidden folder")
            elif entry.is_symlink() and not (follow_links and _leads_down(path, folder)):
                yield Entry(parts=parts, path=path, passed_over="linked folder")
            else:
                waiting.append(_Folder(path, parts, (*folder.above, path.resolve())))


def _leads_down(link: Path, folder: _Folder) -> bool:
    target = link.resolve()
    return not any(above.is_relative_to(target) for above in folder.above)


def _file(
    entry: os.DirEntry[str], parts: tuple[str, ...], wanted: Wanted, *, follow_links: bool
) -> Iterator[Entry]:
    path = Path(entry.path)
    kind = ""
    if is_hidden(entry.name):
        kind = "hidden file"
    elif entry.is_symlink() and not (follow_links and entry.is_file()):
        kind = "linked file"
    elif not entry.is_file():
        kind = "special file"
    if kind:
        yield Entry(parts=parts, path=path, passed_over=kind)
    elif wanted.archives and path.suffix.lower() == ".tar":
        yield from _in_archive(path, (*parts[:-1], path.stem), wanted)
    else:
        status = entry.stat()
        yield Entry(
            parts=parts,
            path=path,
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            passed_over=wanted.why_not(entry.name, status.st_size),
        )


def _in_archive(path: Path, parts: tuple[str, ...], wanted: Wanted) -> Iterator[Entry]:
    status = path.stat()
    archive = Archive(
        path=path, parts=parts, start=0, size=status.st_size, modified_ns=status.st_mtime_ns
    )
    return walk_archive(archive, wanted=wanted)


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
            _refuse_long_name(member.name, parts, archive)
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
    names = sorted({*found, *folders})  # what lies in a folder comes next to it
    for parts, following in zip(names, [*names[1:], ()], strict=True):
        if parts in folders and (following[: len(parts)] != parts or len(following) <= len(parts)):
            yield Entry(
                parts=(*archive.parts, *parts), path=archive.path, passed_over="empty folder"
            )


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


def _refuse_long_name(name: str, parts: tuple[str, ...], archive: Archive) -> None:
    """Refuse a name that no file can have, and that all files of an archive of it would bear."""
    if len(parts) > _MAX_PARTS or len(name) > _MAX_NAME:
        raise UnreadableSourceError(
            f"{archive.place} holds a name of {len(name):,} characters in {len(parts):,} parts, "
            f"more than {_MAX_NAME:,} or {_MAX_PARTS}, which is none of a data set of images. Pack "
            "it again without that file."
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
