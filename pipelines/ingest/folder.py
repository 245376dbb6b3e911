"""The files in a folder, in its sub-folders and in the archives there."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.ingest.archive import Archive, walk_archive
from pipelines.ingest.entry import Entry, Wanted, is_hidden


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
