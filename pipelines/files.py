"""Files that one process at a time writes, that appear whole, and that outlive a power cut."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

DRAFT = ".tmp-"
"""What the name of a file begins with that is not whole yet."""

Held = AbstractContextManager[object]
"""A lock that is held until the end of a `with`, or of the process, however that ends."""


def take_lock(file: Path) -> Held:
    """Wait for a lock among the processes and threads of this machine, and take it.

    Args:
        file: The lock's file; it and its folder are made, and stay.

    Raises:
        OSError: They cannot be made.
    """
    return _lock(file).acquire()


def try_lock(file: Path) -> Held | None:
    """Take a lock unless somebody holds it: see `take_lock`."""
    try:
        return _lock(file).acquire(blocking=False)
    except Timeout:
        return None


def _lock(file: Path) -> FileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A lock of the system and nothing else: a file that means one would outlive its holder. And any
    # thread may let go of it, not only the one that took it.
    return FileLock(file, fallback_to_soft=False, thread_local=False)


def write_atomic(path: Path, data: bytes | memoryview | Iterator[bytes]) -> None:
    """Write a file that a reader sees whole or not at all; an older one is replaced.

    Args:
        path: The file; its folders are made.
        data: Its content, or pieces of it in their order.

    Raises:
        OSError: It cannot be written; an older one is as it was.
    """
    with draft(path, data) as temporary:
        os.replace(temporary, path)


@contextmanager
def draft(path: Path, data: bytes | memoryview | Iterator[bytes]) -> Iterator[Path]:
    """Give a durable file beside a path, whose folders are made; names are made durable after.

    Args:
        path: What the file is to become, by a rename or a link inside the block.
        data: Its content, or pieces of it in their order.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        with _open_anew(temporary) as descriptor:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.writelines([data] if isinstance(data, bytes | memoryview) else data)
            os.fsync(descriptor)
        yield temporary
        temporary.unlink(missing_ok=True)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _open_anew(path: Path) -> Iterator[int]:
    """Opens a new file, making its folders; another process may be pruning them meanwhile."""
    for _ in range(10):
        make_folders(path.parent)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileNotFoundError:
            continue
    else:
        raise FileNotFoundError(errno.ENOENT, "the folder keeps vanishing", str(path.parent))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make a folder and its parents, each durable: a file is lost with its folder's name."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir(exist_ok=True)
            sync(each.parent)
        except FileNotFoundError:
            return


def sync(path: Path) -> None:
    """Have what the system knows of a file, or of the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(path: Path) -> None:
    """Do so for a file, or for a folder and everything in it."""
    if path.is_dir():
        for entry in path.iterdir():
            sync_all(entry)
    sync(path)
