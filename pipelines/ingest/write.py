"""Writing shards, in the MDS format of streaming.

`write_shards` writes a plan's parts by several processes, so that an interrupted ingest goes on
where it stopped. Each part becomes one shard, which is finished when its record (name, size, hash,
samples) lies beside it in the work folder; what is recorded is not written again, unless the record
or the shard has changed since. The index is made of all records and comes last.

`write_dataset` writes samples as they come, whose number nobody knows before.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from pipelines.documents import DocumentError, read_json, seal, unseal, validate_as
from pipelines.errors import EmptyDatasetError, InvalidIndexError, OccupiedPrefixError
from pipelines.files import sync, sync_all, write_atomic
from pipelines.index import IMAGE_COLUMN, INDEX_NAME, LABEL_COLUMN, Shard, parse_index
from pipelines.ingest.processes import spawn
from pipelines.ingest.target import Upload, explain_full_disk, find_shards, lock, refuse_occupied
from pipelines.ingest.work_folder import (
    check_finished,
    clear_place,
    empty_work_folder,
    no_file,
    part_folder,
    record_file,
    shard_file,
    take_over,
)
from pipelines.shards import file_problem
from pipelines.source import Source, prepare_streaming

logger = logging.getLogger(__name__)

_HASH = "sha256"
IMAGE_COLUMNS: Mapping[str, str] = {IMAGE_COLUMN: "bytes", LABEL_COLUMN: "int"}
"""MDS encoding of each field of a stored image."""

S_co = TypeVar("S_co", covariant=True)
S_contra = TypeVar("S_contra", contravariant=True)
WriteSample = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Part(Generic[S_co]):
    """What becomes one shard.

    Attributes:
        number: Place among the shards.
        first: Place of its first sample among those of all parts.
        samples: What its samples are made of, in the order of their ids.
    """

    number: int
    first: int
    samples: Sequence[S_co]


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What there is to say of a shard's content.

    Attributes:
        skipped: Name and reason of each sample that was left out.
        labels: Labels of the others, and how many there are of each.
        noted: What else its filler wants to know once all shards are finished, as JSON.
    """

    skipped: tuple[tuple[str, str], ...]
    labels: tuple[tuple[int, int], ...]
    noted: Mapping[str, Any] = field(default_factory=dict)


class ShardFiller(Protocol[S_contra]):
    """Makes the samples of shards."""

    @property
    def columns(self) -> Mapping[str, str]:
        """MDS encoding of each field of a sample."""
        ...

    def fill(self, part: Part[S_contra], write: WriteSample) -> Filled:
        """Write the samples of one part, in the order of their ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """Record of one shard.

    Attributes:
        number: Place among the shards.
        entry: Its entry in the index; empty for a shard without samples.
        filled: What its filler said of it.
        kept: Whether an earlier start wrote it.
    """

    number: int
    entry: dict[str, Any]
    filled: Filled
    kept: bool = False


def write_shards(
    parts: Sequence[Part[Any]],
    work: Path,
    *,
    plan: str,
    open_filler: Callable[[int], ShardFiller[Any]],
    workers: int,
    retry_skipped: bool = False,
    is_uploaded: Callable[[Shard], bool] = lambda _: False,
) -> Iterator[FinishedShard]:
    """Write every part that is not recorded yet; give each shard as soon as it is finished.

    Args:
        parts: What to write.
        work: Folder of the shards and their records; one of another plan is emptied first.
        plan: Digest of all that decides the shards.
        open_filler: Makes the filler of a process, given the process's number; it is pickled.
        workers: Processes.
        retry_skipped: Write those shards again that left samples out, which may have been repaired.
        is_uploaded: Tells whether a finished shard is where it belongs, and not in the folder.

    Raises:
        OccupiedPrefixError: The folder is none, or holds what no ingest of this plan writes there.
        BrokenIngestError: A process died.
    """
    take_over(work, plan=plan, parts=len(parts))
    missing = []
    for part in parts:
        kept = _read_record(record_file(work, part.number))
        kept = kept if kept and _is_whole(kept, part.number, work, is_uploaded) else None
        if kept and not (retry_skipped and kept.filled.skipped):
            yield kept
        else:
            missing.append(part)
    workers = min(workers, len(missing))
    if workers > 1:
        with spawn(workers, begin=partial(_own_filler, open_filler)) as pool:
            running = [pool.submit(_write_here, part, work) for part in missing]
            for future in as_completed(running):
                yield future.result()
    elif missing:
        filler = open_filler(0)
        for part in missing:
            yield _write(part, work, filler=filler)


class _Own:
    """What a process that writes shards has of its own."""

    filler: ClassVar[Callable[[], ShardFiller[Any]]]


def _own_filler(open_filler: Callable[[int], ShardFiller[Any]], number: int) -> None:
    # Opened by the first part, where a failure is raised and not only logged.
    _Own.filler = cache(partial(open_filler, number))


def _write_here(part: Part[Any], work: Path) -> FinishedShard:
    return _write(part, work, filler=_Own.filler())


def _write(part: Part[Any], work: Path, *, filler: ShardFiller[Any]) -> FinishedShard:
    """Write one part as one shard, and record it."""
    scratch = part_folder(work, part.number)
    clear_place(scratch)
    writer = _mds_writer(scratch, columns=filler.columns, shard_bytes=None)
    filled = filler.fill(part, writer.write)
    writer.finish()
    entry: dict[str, Any] = writer.shards[0] if writer.shards else {}
    file, record = shard_file(work, part.number), record_file(work, part.number)
    # Also where no sample is left, for all that lies here becomes part of the dataset.
    clear_place(file)
    if entry:
        written = scratch / entry["raw_data"]["basename"]
        sync(written)
        written.replace(file)
        entry["raw_data"]["basename"] = file.name
    finished = FinishedShard(number=part.number, entry=entry, filled=filled)
    # A record that exists is whole, and of a shard whose bytes and name outlive a power cut.
    sync(work)
    clear_place(record)
    write_atomic(record, json.dumps(seal(asdict(finished))).encode())
    clear_place(scratch)
    return finished


def _mds_writer(folder: Path, *, columns: Mapping[str, str], shard_bytes: int | None) -> Any:
    prepare_streaming()
    from streaming.base.format.mds import MDSWriter

    out = str(folder.absolute())  # a folder called `a:b` would be taken for a URL
    return MDSWriter(out=out, columns=dict(columns), hashes=[_HASH], size_limit=shard_bytes)


def _is_whole(
    finished: FinishedShard, number: int, work: Path, is_uploaded: Callable[[Shard], bool]
) -> bool:
    """Tell whether a shard is as its record says; a warning says of one why it is not."""
    file = shard_file(work, number)
    problem = _shard_problem(finished, number, file, is_uploaded)
    if problem:
        logger.warning("writing a shard again, since %s %s", file, problem)
    return not problem


def _shard_problem(
    finished: FinishedShard, number: int, file: Path, is_uploaded: Callable[[Shard], bool]
) -> str | None:
    if finished.number != number:
        return "has the record of another one"
    if not finished.entry:
        return "is there, but its record tells of no samples" if os.path.lexists(file) else None
    try:
        (shard,) = parse_index(index_of([finished.entry]), prefix=str(file.parent))
    except (InvalidIndexError, EmptyDatasetError):
        return "has a record that no ingest writes"
    if shard.name != file.name or shard.hash_name != _HASH:
        return "has the record of another one"
    try:
        return no_file(file) or file_problem(file, shard)
    except FileNotFoundError:
        return None if is_uploaded(shard) else "is gone"


def _read_record(record: Path) -> FinishedShard | None:
    """Read a record; None if there is none that can be believed."""
    try:
        if problem := no_file(record):
            raise DocumentError(f"it {problem}")
        return replace(validate_as(FinishedShard, unseal(read_json(record))), kept=True)
    except FileNotFoundError:
        return None
    except (DocumentError, OSError) as error:
        logger.warning("writing a shard again, since %s cannot be used: %s", record, error)
        return None


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One sample to be written.

    Attributes:
        data: Encoded image, JPEG or PNG.
        label: Class index.
    """

    data: bytes
    label: int


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
    source = Source(prefix)
    target = source.folder
    if target is None:
        _write_remote(images, source, shard_bytes=shard_bytes)
        return
    with lock(target.with_name(f".{target.name}.lock")), explain_full_disk(target.parent):
        if present := find_shards(source):
            _compare(images, present, prefix=source.prefix, shard_bytes=shard_bytes)
            return
        refuse_occupied(target)
        building = target.with_name(f".{target.name}.building")
        empty_work_folder(building)
        names = [name for name, _ in _build(images, building, shard_bytes=shard_bytes)]
        check_finished(building, [*names, INDEX_NAME])
        sync_all(building)
        building.replace(target)
        sync(target.parent)


def _write_remote(images: Iterable[LabelledImage], source: Source, *, shard_bytes: int) -> None:
    if present := find_shards(source):
        _compare(images, present, prefix=source.prefix, shard_bytes=shard_bytes)
        return
    with (
        tempfile.TemporaryDirectory(prefix="lapflow-ingest-") as scratch,
        explain_full_disk(Path(scratch)),
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
    writer = _mds_writer(folder, columns=IMAGE_COLUMNS, shard_bytes=shard_bytes)
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


class PackedShard(NamedTuple):
    """A shard in memory.

    Attributes:
        data: The file's bytes.
        entry: Its entry in the index.
    """

    data: bytes
    entry: dict[str, Any]


def pack_shard(images: Iterable[LabelledImage], *, name: str) -> PackedShard:
    """Make one shard of images.

    Args:
        images: Its samples, at least one, in the order of their ids.
        name: What the file is to be called.

    Raises:
        UnwritableTargetError: There is no room in the temporary folder, where it is built.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lapflow-shard-") as scratch,
        explain_full_disk(Path(scratch)),
    ):
        writer = _mds_writer(Path(scratch) / "shard", columns=IMAGE_COLUMNS, shard_bytes=None)
        for image in images:
            writer.write({IMAGE_COLUMN: image.data, LABEL_COLUMN: image.label})
        writer.finish()
        (entry,) = writer.shards
        data = (Path(scratch) / "shard" / entry["raw_data"]["basename"]).read_bytes()
    entry["raw_data"]["basename"] = name
    return PackedShard(data, entry)


def index_of(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the index of a dataset, to be written when all its shards are in place."""
    return json.dumps({"version": 2, "shards": list(entries)}, sort_keys=True).encode()
