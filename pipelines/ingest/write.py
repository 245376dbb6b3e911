"""Write encoded images as an MDS dataset, to a local folder or an object store.

The index is written last, and only when every shard is in place, so what an interrupted write
leaves behind does not count as a dataset and the write can simply be run again.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import (
    EmptyDatasetError,
    MissingDatasetError,
    OccupiedPrefixError,
    StoreUnreachableError,
    UnwritableTargetError,
)
from pipelines.files import take_lock
from pipelines.index import IMAGE_COLUMN, INDEX_NAME, LABEL_COLUMN, Shard, parse_index
from pipelines.proxies import proxy_hint
from pipelines.source import DISK_ERRORS, Source, SourceConfig, describe_failure

_HASH = "sha256"
_UPLOAD_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One sample to be written.

    Attributes:
        data: Encoded image, JPEG or PNG.
        label: Class index.
    """

    data: bytes
    label: int


def has_dataset(prefix: str) -> bool:
    """Tell whether there is a finished dataset at a prefix."""
    return _present(Source(prefix, config=SourceConfig())) is not None


def write_dataset(
    images: Iterable[LabelledImage], prefix: str, *, shard_bytes: int = 1 << 26
) -> None:
    """Write a dataset, unless the same one is there already.

    Args:
        images: The samples, in the order of their ids.
        prefix: Local folder or URL (s3://bucket/folder).
        shard_bytes: Size at which a shard is closed.

    Raises:
        OccupiedPrefixError: The prefix holds another dataset, or a local folder other files.
        EmptyDatasetError: There are no images.
        UnwritableTargetError: The local folder cannot be made or written.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    source = Source(prefix, config=SourceConfig())
    target = source.folder
    if target is None:
        _write_remote(images, source, shard_bytes=shard_bytes)
        return
    with locked(target.with_name(f".{target.name}.lock")), told_when_full(target.parent):
        _write_local(images, source, target, shard_bytes=shard_bytes)


def _write_local(
    images: Iterable[LabelledImage], source: Source, target: Path, *, shard_bytes: int
) -> None:
    present = _present(source)
    if present is not None:
        _compare(images, present, prefix=source.prefix, shard_bytes=shard_bytes)
        return
    refuse_occupied(target)
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    for _ in _build(images, building, shard_bytes=shard_bytes):
        pass
    building.replace(target)


def _write_remote(images: Iterable[LabelledImage], source: Source, *, shard_bytes: int) -> None:
    present = _present(source)
    if present is not None:
        _compare(images, present, prefix=source.prefix, shard_bytes=shard_bytes)
        return
    with (
        tempfile.TemporaryDirectory(prefix="lapflow-ingest-") as scratch,
        told_when_full(Path(scratch)),
    ):
        folder = Path(scratch) / "dataset"
        upload = Upload(folder, source.prefix)
        for name, _ in _build(images, folder, shard_bytes=shard_bytes):
            upload(name)
        upload(INDEX_NAME)


def _compare(
    images: Iterable[LabelledImage], present: tuple[Shard, ...], *, prefix: str, shard_bytes: int
) -> None:
    """Build the dataset once more, only to see that it is the one that is present."""
    wanted = [(shard.name, shard.hash_value) for shard in present]
    with tempfile.TemporaryDirectory(prefix="lapflow-ingest-") as scratch:
        folder = Path(scratch) / "dataset"
        number = 0
        for number, built in enumerate(_build(images, folder, shard_bytes=shard_bytes), start=1):
            if wanted[number - 1 : number] != [built]:
                break
            (folder / built[0]).unlink()
        else:
            if number == len(wanted):
                return
    raise OccupiedPrefixError(
        f"{prefix} holds another dataset, so nothing was written. Choose another prefix, or remove "
        "the one that is there."
    )


def _build(
    images: Iterable[LabelledImage], folder: Path, *, shard_bytes: int
) -> Iterator[tuple[str, str]]:
    """Write a dataset into a new folder, giving (name, hash) of each shard as it is finished.

    The index is there when the last shard has been given.
    """
    from streaming.base.format.mds import MDSWriter

    writer: Any = MDSWriter(
        out=str(folder),
        columns={IMAGE_COLUMN: "bytes", LABEL_COLUMN: "int"},
        hashes=[_HASH],
        size_limit=shard_bytes,
    )
    given = 0
    try:
        for image in images:
            writer.write({IMAGE_COLUMN: image.data, LABEL_COLUMN: image.label})
            for entry in writer.shards[given:]:
                given += 1
                yield _name_and_hash(entry)
        if not writer.shards and not writer.new_samples:
            raise EmptyDatasetError(
                "There are no images to write. Check the source they were to be read from."
            )
    except BaseException:
        # Not `finish`, which would write an index of what there is.
        writer.cancel_future_jobs()
        raise
    writer.finish()
    for entry in writer.shards[given:]:
        yield _name_and_hash(entry)


def _name_and_hash(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["raw_data"]["basename"], entry["raw_data"]["hashes"][_HASH]


def _present(source: Source) -> tuple[Shard, ...] | None:
    try:
        return parse_index(source.read_index(), prefix=source.prefix)
    except MissingDatasetError:
        return None


def refuse_occupied(target: Path) -> None:
    """Refuse a local folder that a dataset would share with other files.

    Raises:
        OccupiedPrefixError: It is a file, or holds some.
        UnwritableTargetError: It cannot be looked into.
    """
    try:
        if not target.exists():
            return
        is_folder = target.is_dir()
        free = is_folder and not any(target.iterdir())
    except OSError as error:
        raise _unwritable(target, error) from error
    if not free:
        found = "holds other files and no finished dataset" if is_folder else "is a file"
        raise OccupiedPrefixError(
            f"{target} {found}, so it is left alone. Choose another prefix, or remove it."
        )


def _unwritable(folder: Path, error: OSError) -> UnwritableTargetError:
    return UnwritableTargetError(
        f"The folder {folder} cannot be made or written ({error.strerror}: {error.filename}). "
        "Choose another one, or let this user write there."
    )


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
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
def locked(path: Path) -> Iterator[None]:
    """Let one process of this host pass at a time.

    Args:
        path: Lock file, in a folder that is made when it is missing.

    Raises:
        UnwritableTargetError: Folder or file cannot be made.
    """
    try:
        lock = take_lock(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    with lock:
        yield


class Upload:
    """Moves files of a folder to a prefix in a store."""

    def __init__(self, folder: Path, prefix: str) -> None:
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
