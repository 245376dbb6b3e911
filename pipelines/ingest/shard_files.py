"""Writing shards by several processes, so that an interrupted ingest goes on where it stopped.

The images are cut into parts before anything is written, and each part becomes one shard. A shard
is finished when its record (name, size, hash, samples) lies beside it in the work folder; what is
recorded is not written again. The index is made of all records and comes last.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipelines.encoded import BadImageError
from pipelines.index import IMAGE_COLUMN, LABEL_COLUMN
from pipelines.ingest.listing import ListedImage
from pipelines.ingest.resize import Resize, checked
from pipelines.torchvision_cpu import ensure_torchvision

_HASH = "sha256"
_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What becomes one shard.

    Attributes:
        number: Place among the shards.
        images: Its images, in the order of their ids.
    """

    number: int
    images: tuple[ListedImage, ...]


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """Record of one shard.

    Attributes:
        number: Place among the shards.
        entry: Its entry in the index.
        skipped: Name and reason of each image that was left out.
    """

    number: int
    entry: dict[str, Any]
    skipped: tuple[tuple[str, str], ...]


def cut(images: Sequence[ListedImage], *, shard_bytes: int) -> tuple[Part, ...]:
    """Cut images into parts of at most ``shard_bytes`` of source bytes, one image at least."""
    parts: list[Part] = []
    current: list[ListedImage] = []
    total = 0
    for image in images:
        if current and total + image.size > shard_bytes:
            parts.append(Part(number=len(parts), images=tuple(current)))
            current, total = [], 0
        current.append(image)
        total += image.size
    return (*parts, Part(number=len(parts), images=tuple(current)))


def plan_digest(parts: Sequence[Part], resize: Resize | None) -> str:
    """Digest of what decides the shards: names, sizes and classes of the images, and the resize.

    Where the images lie does not count, so that a moved or unpacked source is the same one.
    """
    digest = hashlib.sha256(json.dumps(asdict(resize) if resize else None).encode())
    for part in parts:
        for image in part.images:
            digest.update(json.dumps([part.number, image.name, image.size, image.label]).encode())
    return digest.hexdigest()


def write_shards(
    parts: Sequence[Part], work: Path, *, resize: Resize | None, workers: int
) -> Iterator[FinishedShard]:
    """Write every part that is not recorded yet; give each shard as soon as it is finished.

    Args:
        parts: What to write.
        work: Folder of the shards and their records; one of another plan is emptied first.
        resize: How to rewrite the images; None keeps their bytes.
        workers: Processes.
    """
    digest = plan_digest(parts, resize)
    plan = work / _PLAN
    if not plan.is_file() or plan.read_text() != digest:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        plan.write_text(digest)
    missing = []
    for part in parts:
        record = _record(work, part.number)
        if record.is_file():
            yield _finished(record)
        else:
            missing.append(part)
    if workers <= 1 or len(missing) <= 1:
        for part in missing:
            yield write_shard(part, work, resize=resize)
        return
    # Spawned, because a process that has threads must not be forked.
    with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn")) as pool:
        running = [pool.submit(write_shard, part, work, resize=resize) for part in missing]
        for future in as_completed(running):
            yield future.result()


def write_shard(part: Part, work: Path, *, resize: Resize | None) -> FinishedShard:
    """Write one part as one shard, and record it."""
    ensure_torchvision()
    from streaming.base.format.mds import MDSWriter

    scratch = work / f"part.{part.number:05d}"
    shutil.rmtree(scratch, ignore_errors=True)
    writer: Any = MDSWriter(
        out=str(scratch),
        columns={IMAGE_COLUMN: "bytes", LABEL_COLUMN: "int"},
        hashes=[_HASH],
        size_limit=None,
    )
    encode: Callable[[bytes], bytes] = resize or checked
    skipped = []
    for image in part.images:
        try:
            data = encode(image.read())
        except (BadImageError, OSError) as error:
            skipped.append((image.name, str(error)))
            continue
        writer.write({IMAGE_COLUMN: data, LABEL_COLUMN: image.label})
    writer.finish()
    entries = json.loads((scratch / "index.json").read_text())["shards"]
    entry = entries[0] if entries else {}
    if entry:
        name = f"shard.{part.number:05d}.mds"
        (scratch / entry["raw_data"]["basename"]).replace(work / name)
        entry["raw_data"]["basename"] = name
    finished = FinishedShard(number=part.number, entry=entry, skipped=tuple(skipped))
    record = _record(work, part.number)
    # Renamed into place: a record that exists is whole.
    draft = record.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(finished)))
    draft.replace(record)
    shutil.rmtree(scratch)
    return finished


def discard_records(work: Path) -> None:
    """Remove what only an unfinished ingest needs."""
    for path in (*work.glob("*.record"), *work.glob("*.draft"), work / _PLAN):
        path.unlink(missing_ok=True)
    for path in work.glob("part.*"):
        shutil.rmtree(path)


def _record(work: Path, number: int) -> Path:
    return work / f"shard.{number:05d}.record"


def _finished(record: Path) -> FinishedShard:
    values = json.loads(record.read_text())
    return FinishedShard(
        number=values["number"],
        entry=values["entry"],
        skipped=tuple((name, reason) for name, reason in values["skipped"]),
    )
