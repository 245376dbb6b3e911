"""A store in a local or network-mounted folder; objects survive a power cut once written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.files import DRAFT, draft, make_folders, sync, write_atomic
from trainer.storage.errors import MissingObject, StoreError
from trainer.storage.store import check_key, check_prefix

_CAUSES = {
    errno.ENOSPC: "the disk is full; free space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free space or choose another folder",
    errno.EACCES: "this user may not access it; change its permissions or choose another folder",
    errno.EPERM: "the file system does not permit it; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a part of the path is a file; choose another folder",
    errno.EOPNOTSUPP: "the file system cannot do this; choose another folder",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter run name",
}


class LocalStore:
    """Objects as files: written beside their place, made durable, then renamed into it.

    A process that dies while it writes leaves a file whose name begins with ".tmp-"; only
    `abort_unfinished` sees it.

    Args:
        root: The folder; made with the first object.
    """

    def __init__(self, root: Path) -> None:
        # Absolute, because workers may be started in another directory.
        self._root = root.expanduser().absolute()

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object by rename."""
        with self._explain_errors("write", key):
            write_atomic(self._path(key), data)

    def put_pieces(self, key: str, pieces: Iterator[bytes]) -> None:
        """Write an object piece by piece, then rename it."""
        with self._explain_errors("write", key):
            write_atomic(self._path(key), pieces)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object by a hard link, which fails if the name is taken."""
        path = self._path(key)
        with self._explain_errors("write", key), draft(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            return True

    def get(self, key: str) -> bytes:
        """Read an object."""
        return self.get_range(key, 0, -1)

    def get_range(self, key: str, start: int, size: int) -> bytes:
        """Read a part of a file."""
        with self._explain_errors("read", key):
            try:
                with open(self._path(key), "rb", opener=_opened_to_read) as file:
                    file.seek(start)
                    return file.read(size)
            except FileNotFoundError as error:
                raise MissingObject(f"There is no object at {self.uri(key)}.") from error

    def fingerprint(self, key: str) -> str:
        """Join the file's number, size and time; a new file takes an object's place."""
        with self._explain_errors("read", key):
            try:
                status = self._path(key).stat()
            except FileNotFoundError as error:
                raise MissingObject(f"There is no object at {self.uri(key)}.") from error
        return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"

    def move(self, key: str, to: str) -> None:
        """Rename a file, and make both names durable."""
        with self._explain_errors("move", key):
            path, target = self._path(key), self._path(to)
            make_folders(target.parent)
            try:
                path.rename(target)
            except FileNotFoundError as error:
                raise MissingObject(f"There is no object at {self.uri(key)}.") from error
            for folder in {path.parent, target.parent}:
                sync(folder)

    def delete(self, key: str) -> None:
        """Remove an object and the folders it leaves empty."""
        with self._explain_errors("delete", key):
            self._remove(self._path(key))

    def delete_all(self, keys: Collection[str]) -> None:
        """Remove objects one after the other, which takes no time here."""
        for key in keys:
            self.delete(key)

    def uri(self, key: str) -> str:
        """Return the path of the object's file."""
        return str(self._path(key))

    def list(self, prefix: str) -> dict[str, int]:
        """Walk the folder the prefix names."""
        sizes: dict[str, int] = {}
        for path in self._files(prefix):
            if not path.name.startswith(DRAFT):
                with self._explain_errors("list", self._key(path)):
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        continue  # deleted since the folder was read
                if stat.S_ISREG(status.st_mode):
                    sizes[self._key(path)] = status.st_size
        return dict(sorted(sizes.items()))

    def abort_unfinished(self, prefix: str, is_dead: Callable[[str], bool]) -> int:
        """Remove temporary files."""
        swept = 0
        for path in self._files(prefix):
            if path.name.startswith(DRAFT) and is_dead(self._key(path)):
                with self._explain_errors("delete", self._key(path)):
                    self._remove(path)
                swept += 1
        return swept

    def _files(self, prefix: str) -> Iterator[Path]:
        """All files, temporary ones too, whose key begins so."""
        check_prefix(prefix)
        folder, _, _ = prefix.rpartition("/")
        top = self._path(folder) if folder else self._root
        with self._explain_errors("list", folder):
            for parent, _, names in os.walk(top, onerror=_raise_unless_missing):
                paths = (Path(parent, name) for name in names)
                yield from (path for path in paths if self._key(path).startswith(prefix))

    def _remove(self, path: Path) -> None:
        """Removes a file and the folders it leaves empty."""
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self._root or not _removed_empty(folder):
                break

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _explain_errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = self._root / key
            cause = _CAUSES.get(error.errno or 0, f"the system says: {error.strerror or error}")
            raise StoreError(f"Cannot {verb} {place}: {cause}.") from error


def _opened_to_read(path: str, flags: int) -> int:
    """Opens a file; a pipe or a device in its place, which may have no end, is no object."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "this is no regular file", path)


def _removed_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _raise_unless_missing(error: OSError) -> None:
    """A folder that cannot be read is no empty folder: that would start a run from nothing."""
    if not isinstance(error, FileNotFoundError):
        raise error
