"""The folder on this node in which shards are kept, shared by all processes that read them.

A shard is fetched into a folder of its own under `.partial/`, checked there, and then moved to its
name, so a file under a shard's name was whole when it was put there, whenever a reader is killed.
Fetching happens under a lock per shard that the system lets go of when its holder dies.
"""

import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from pipelines.errors import CacheUnusableError
from pipelines.files import take_lock, try_lock
from pipelines.index import INDEX_NAME

logger = logging.getLogger(__name__)

_SLOW_S = 30.0


@contextmanager
def warn_when_slow(step: str) -> Iterator[None]:
    """Log a warning if the block takes longer than 30 s.

    Args:
        step: What the block does, to go on after "still": "fetching s3://bucket/key".
    """
    timer = threading.Timer(_SLOW_S, logger.warning, ("still %s after %.0f s", step, _SLOW_S))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def default_cache_dir() -> Path:
    """Name the folder used where none is configured: a private one under the temporary folder.

    Raises:
        CacheUnusableError: Somebody else made a folder of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"lapflow-shards-{os.getuid()}"
    with _explain_unusable(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise CacheUnusableError(
            f"{folder} belongs to another user, so shards in it cannot be trusted. Set cache_dir "
            "to a folder of your own."
        )
    return folder


@contextmanager
def _explain_unusable(folder: Path) -> Iterator[None]:
    """Turn failures to write the folder into one clear error."""
    try:
        yield
    except OSError as error:
        raise CacheUnusableError(
            f"The shard cache {folder} cannot be written ({error}). Free some space, or set "
            "cache_dir to a folder on a local disk that this user may write."
        ) from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder under the temporary folder, and remove it.

    Those of killed processes are used again, so there are never more than are needed at a time.

    Raises:
        CacheUnusableError: It cannot be made.
    """
    root = default_cache_dir() / "scratch"
    with _explain_unusable(root):
        root.mkdir(exist_ok=True)
    for number in count():
        with _explain_unusable(root):
            lock = try_lock(root / f"{number}.lock")
        if lock is not None:
            with lock, _make_empty(root / str(number)) as folder:
                yield folder
            return


@contextmanager
def _make_empty(folder: Path) -> Iterator[Path]:
    """Make a folder anew, and remove it at the end; its lock is held."""
    with _explain_unusable(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock_file(cache: Path, flat: str) -> Path:
    return cache / ".locks" / f"{flat}.lock"


def _caches(root: Path) -> list[Path]:
    """Folders of datasets; other things may be kept under the root too."""
    return [folder for folder in root.iterdir() if (folder / ".partial").is_dir()]


def _remove_left_behind(cache: Path) -> None:
    """Remove what killed processes had fetched of their shards; of the living nothing."""
    with suppress(OSError):  # the cache of another user, say
        for partial in list((cache / ".partial").iterdir()):
            if (lock := try_lock(_lock_file(cache, partial.name))) is not None:
                with lock:
                    shutil.rmtree(partial, ignore_errors=True)


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
        with _explain_unusable(root):
            for part in (".partial", ".locks"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            for cache in _caches(root):
                _remove_left_behind(cache)
        # For whoever looks into the folder; it is never read. Of this name it is always the same,
        # and where all shards are there a full disk is no hindrance.
        if not (self.folder / INDEX_NAME).exists():
            with self.fetching(INDEX_NAME) as partial, _explain_unusable(root):
                (partial / INDEX_NAME).write_bytes(index)
                (partial / INDEX_NAME).replace(self.folder / INDEX_NAME)

    @contextmanager
    def fetching(self, name: str) -> Iterator[Path]:
        """Hold a shard's lock, and give an empty folder to fetch it into.

        Args:
            name: The shard's checked name.
        """
        flat = name.replace("/", "%")
        file = _lock_file(self.folder, flat)
        with _explain_unusable(self.folder):
            lock = try_lock(file)
            if lock is None:
                with warn_when_slow(f"waiting for another process to fetch {self.folder / name}"):
                    lock = take_lock(file)
        with lock, _make_empty(self.folder / ".partial" / flat) as partial:
            yield partial

    def keep(self, name: str, *, fetched: Path) -> None:
        """Move a checked file to its name."""
        with _explain_unusable(self.folder):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.utime(fetched)
            fetched.replace(path)
            if self._limit_bytes is not None:
                self._trim(self._limit_bytes, spared=path)

    def mark_used(self, names: Iterable[str]) -> None:
        """Note that shards are in use, so that others are removed before them."""
        for name in names:
            # It may have been removed; then it is fetched again.
            with suppress(FileNotFoundError):
                os.utime(self.folder / name)

    def _trim(self, limit_bytes: int, *, spared: Path) -> None:
        """Remove shards until the rest fits; readers fetch again what they miss."""
        with take_lock(self._root / ".trim.lock"):
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
        for cache in _caches(self._root):
            for folder, inner, names in os.walk(cache):
                inner[:] = [name for name in inner if not name.startswith(".")]
                for name in names:
                    path = Path(folder) / name
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        if name != INDEX_NAME:
                            yield status.st_mtime_ns, status.st_size, path
