"""The folder on this node in which shards are kept, shared by all processes that read them.

A shard is fetched into a folder of its own under `.partial/`, checked there, and then moved to its
name, so a file under a shard's name was whole when it was put there, whenever a reader is killed.
Fetching happens under a lock per shard that the system lets go of when its holder dies.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.errors import CacheUnusableError
from pipelines.index import INDEX_NAME


def default_cache_dir() -> Path:
    """Name the folder used where none is configured: a private one under the temporary folder.

    Raises:
        CacheUnusableError: Somebody else made a folder of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"lapflow-shards-{os.getuid()}"
    with _usable(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise CacheUnusableError(
            f"{folder} belongs to another user, so shards in it cannot be trusted. Set cache_dir "
            "to a folder of your own."
        )
    return folder


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn failures to write the folder into one clear error."""
    try:
        yield
    except OSError as error:
        raise CacheUnusableError(
            f"The shard cache {folder} cannot be written ({error}). Free some space, or set "
            "cache_dir to a folder on a local disk that this user may write."
        ) from error


class ShardCache:
    """Files of one version of one dataset.

    Args:
        root: Folder that holds the caches of all datasets.
        prefix: The dataset's prefix in its store.
        index: Content of its index.json. A dataset that was written anew has another index and
            therefore another cache.
        limit_bytes: Size of all caches under the root above which shards are removed, those first
            that were not asked for the longest; None keeps everything.

    Raises:
        CacheUnusableError: The folder cannot be made.
    """

    def __init__(
        self, root: Path, *, prefix: str, index: bytes, limit_bytes: int | None = None
    ) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        key = hashlib.sha256(prefix.encode() + b"\0" + index).hexdigest()[:32]
        self.folder = root / key
        with _usable(root):
            for part in (".partial", ".locks"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            copy = self.folder / ".partial" / f"{INDEX_NAME}.{os.getpid()}"
            copy.write_bytes(index)
            copy.replace(self.folder / INDEX_NAME)

    @contextmanager
    def fetching(self, name: str) -> Iterator[Path]:
        """Hold a shard's lock, and give an empty folder to fetch it into.

        Args:
            name: The shard's checked name.
        """
        flat = name.replace("/", "%")
        partial = self.folder / ".partial" / flat
        with _usable(self.folder):
            lock = (self.folder / ".locks" / f"{flat}.lock").open("wb")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _usable(self.folder):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def keep(self, name: str, *, fetched: Path) -> None:
        """Move a checked file to its name."""
        with _usable(self.folder):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fetched.replace(path)
            os.utime(path)
            if self._limit_bytes is not None:
                self._trim(self._limit_bytes, spared=path)

    def used(self, names: Iterable[str]) -> None:
        """Note that shards are in use, so that others are removed before them."""
        for name in names:
            # It may have been removed; then it is fetched again.
            with suppress(FileNotFoundError):
                os.utime(self.folder / name)

    def _trim(self, limit_bytes: int, *, spared: Path) -> None:
        """Remove shards until the rest fits; readers fetch again what they miss."""
        with (self._root / ".trim.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shards = sorted(self._shards())
            total = sum(size for _, size, _ in shards)
            for _, size, path in shards:
                if total <= limit_bytes:
                    return
                if path != spared:
                    path.unlink(missing_ok=True)
                    total -= size

    def _shards(self) -> Iterator[tuple[int, int, Path]]:
        """When each shard of all datasets was last used, its size and its place."""
        # Other things may be kept under the root; a cache of shards is known by its folders.
        caches = [folder for folder in self._root.iterdir() if (folder / ".partial").is_dir()]
        for cache in caches:
            for folder, inner, names in os.walk(cache):
                inner[:] = [name for name in inner if not name.startswith(".")]
                for name in names:
                    path = Path(folder) / name
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        if name != INDEX_NAME:
                            yield status.st_mtime_ns, status.st_size, path
