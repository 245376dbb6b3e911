"""The place that a dataset is written to: looked at, locked, and uploaded to.

The index comes last, and only when every shard is in place, so what an interrupted write leaves
behind does not count as a dataset and the write can simply be run again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import (
    CorruptShardError,
    MissingDatasetError,
    OccupiedPrefixError,
    StoreUnreachableError,
    UnwritableTargetError,
)
from pipelines.files import take_lock
from pipelines.index import Shard, parse_index
from pipelines.ingest.about import read_about
from pipelines.proxies import proxy_hint
from pipelines.source import DISK_ERRORS, Source, describe_failure, prepare_streaming

_UPLOAD_ATTEMPTS = 5


def find_shards(source: Source) -> tuple[Shard, ...] | None:
    """Read the index of a finished dataset; None if there is none."""
    try:
        return parse_index(source.read_index(), prefix=source.prefix)
    except MissingDatasetError:
        return None


def has_dataset(prefix: str) -> bool:
    """Tell whether there is a finished dataset at a prefix."""
    return find_shards(Source(prefix)) is not None


def is_complete(prefix: str, *, plan: str) -> bool:
    """Tell whether a dataset is finished already.

    Args:
        prefix: Local folder or URL of the split.
        plan: Digest of all that decides the dataset.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        CorruptShardError: A shard of it in a local folder is gone, or was cut.
        UnwritableTargetError: A local folder cannot be looked into.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    source = Source(prefix)
    shards = find_shards(source)
    complete = shards is not None
    about = read_about(prefix) if complete else None
    if complete and (about is None or about.plan != plan):
        raise OccupiedPrefixError(
            f"{prefix} holds another dataset, or one of the same images before some were replaced, "
            "so nothing was written. Choose another prefix, or remove the one that is there."
        )
    if source.folder is not None and not complete:
        refuse_occupied(source.folder)
    if source.folder is not None:
        _refuse_damaged(source.folder, shards or ())
    return complete


def _refuse_damaged(folder: Path, shards: Sequence[Shard]) -> None:
    """Refuse to call a dataset complete whose shards are not as long as its index says."""
    for shard in shards:
        file = folder / shard.name
        if not file.is_file() or file.stat().st_size != shard.size_bytes:
            raise CorruptShardError(
                f"{folder} holds this dataset already, but its {shard.name} is gone or was cut. "
                "Remove the folder, and run the same command again."
            )


def refuse_occupied(target: Path) -> None:
    """Refuse a local folder that a dataset would share with other files.

    Raises:
        OccupiedPrefixError: It is a file or a link, which no folder replaces, or holds some.
        UnwritableTargetError: It cannot be looked into.
    """
    try:
        if target.is_symlink():
            found = "is a link"
        elif not target.is_dir():
            found = "is a file" if target.exists() else ""
        else:
            found = "holds other files and no finished dataset" if any(target.iterdir()) else ""
    except OSError as error:
        raise _unwritable_error(target, error) from error
    if found:
        raise OccupiedPrefixError(
            f"{target} {found}, so it is left alone. Choose another prefix, or remove it."
        )


def _unwritable_error(folder: Path, error: OSError) -> UnwritableTargetError:
    return UnwritableTargetError(
        f"The folder {folder} cannot be made or written ({error.strerror}: {error.filename}). "
        "Choose another one, or let this user write there."
    )


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn failures of the disk that is written to into one clear error.

    Raises:
        UnwritableTargetError: The disk is full, or refuses to be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UnwritableTargetError(
            f"{folder} cannot be written any more ({error.strerror}). Free some space there, or "
            "choose another place, and run the same command again; what is finished is kept."
        ) from error


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one process of this host pass at a time.

    Args:
        path: Lock file, in a folder that is made when it is missing.

    Raises:
        UnwritableTargetError: Folder or file cannot be made.
    """
    try:
        held = take_lock(path)
    except OSError as error:
        raise _unwritable_error(path.parent, error) from error
    with held:
        yield


class Upload:
    """Moves files of a folder to a prefix in a store."""

    def __init__(self, folder: Path, prefix: str) -> None:
        prepare_streaming()
        from streaming.base.storage.upload import CloudUploader

        self._prefix = prefix
        try:
            self._uploader: Any = CloudUploader.get(
                (str(folder), prefix), retry=_UPLOAD_ATTEMPTS, exist_ok=True
            )
        except Exception as error:
            raise self._failure(error) from error

    def __call__(self, name: str) -> None:
        """Upload one file.

        Raises:
            StoreUnreachableError: The store refuses, or does not answer.
        """
        try:
            self._uploader.upload_file(name)
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StoreUnreachableError:
        return StoreUnreachableError(
            f"The dataset could not be written to {self._prefix} ({describe_failure(error)}). "
            "Check that the bucket exists, that the credentials may write to it and, if the store "
            f"is not AWS, that S3_ENDPOINT_URL names it.{proxy_hint(None)} Then run the same "
            "command again."
        )
