"""Turn a folder of images into a dataset, with one sub-folder or tar archive for each class.

    python -m pipelines.ingest image-folder pictures s3://bucket/datasets/pictures --hold-out 0.1

Run the same command again after an interruption: finished shards are kept.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import (
    BadDataError,
    BrokenIngestError,
    EmptyDatasetError,
    IngestSettingError,
    OccupiedPrefixError,
)
from pipelines.index import INDEX_NAME
from pipelines.ingest.listing import Listing, hold_out, list_images, read_class_names
from pipelines.ingest.progress import Progress
from pipelines.ingest.resize import Resize
from pipelines.ingest.shard_files import (
    FinishedShard,
    Part,
    cut,
    discard_records,
    plan_digest,
    write_shards,
)
from pipelines.ingest.write import Upload, has_dataset, locked, refuse_occupied
from pipelines.order import permutation
from pipelines.source import Source, SourceConfig

ABOUT_NAME = "ingest.json"


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How a dataset is written.

    Attributes:
        resize: Size and encoding to rewrite images in; None keeps their bytes.
        shard_bytes: Source bytes after which a shard is closed.
        workers: Processes.
        seed: Seed of the order in which images are stored, which mixes the classes.
        max_skipped_share: Share of the images that may be left out for being undecodable.
        work_dir: Folder for unfinished shards of a remote dataset.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    resize: Resize | None = None
    shard_bytes: int = 1 << 26
    workers: int = 1
    seed: int = 0
    max_skipped_share: float = 0.01
    work_dir: Path = Path("~/.cache/lapflow/ingest")

    def __post_init__(self) -> None:
        for name, value in (("shard_bytes", self.shard_bytes), ("workers", self.workers)):
            if value < 1:
                raise IngestSettingError(f"{name}={value} must be at least 1.")
        if self.seed < 0:
            raise IngestSettingError(f"seed={self.seed} must be 0 or more.")
        if not 0 <= self.max_skipped_share <= 1:
            raise IngestSettingError(
                f"max_skipped_share={self.max_skipped_share} must lie in [0, 1]."
            )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be written where, known before anything is."""

    source: Source
    listing: Listing
    parts: tuple[Part, ...]
    digest: str
    complete: bool


def ingest(
    listing: Listing, prefix: str, *, config: IngestConfig, note: Callable[[str], None]
) -> None:
    """Write the images of a listing as a dataset, or go on with one that was interrupted.

    Args:
        listing: The images and the names of their classes.
        prefix: Local folder or URL of the split.
        config: How to write.
        note: Takes lines for the user.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        UnwritableTargetError: A local folder cannot be made or written.
        BadDataError: Too many images cannot be decoded.
        EmptyDatasetError: None can, or there are none.
        BrokenIngestError: A process died.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    _carry_out(_planned(listing, prefix, config=config), config=config, note=note)


def _planned(listing: Listing, prefix: str, *, config: IngestConfig) -> _Plan:
    """Plan a dataset, and refuse a place that cannot take it."""
    if not listing.images:
        raise EmptyDatasetError(f"There are no images to write to {prefix}.")
    order = permutation(len(listing.images), config.seed)
    parts = cut([listing.images[place] for place in order], shard_bytes=config.shard_bytes)
    digest = plan_digest(parts, config.resize)
    source = Source(prefix, config=SourceConfig())
    complete = has_dataset(prefix)
    if complete and _about(source).get("plan") != digest:
        raise OccupiedPrefixError(
            f"{prefix} holds another dataset, so nothing was written. Choose another prefix, or "
            "remove the one that is there."
        )
    if source.is_local and not complete:
        refuse_occupied(Path(source.prefix))
    return _Plan(source=source, listing=listing, parts=parts, digest=digest, complete=complete)


def _carry_out(plan: _Plan, *, config: IngestConfig, note: Callable[[str], None]) -> None:
    source, target = plan.source, Path(plan.source.prefix)
    if source.is_local:
        work = target.with_name(f".{target.name}.building")
    else:
        # Named after what is written and where to, for uploaded shards are not kept here.
        place = hashlib.sha256(f"{plan.digest} {source.prefix}".encode()).hexdigest()[:16]
        work = config.work_dir.expanduser() / place
    with locked(work.with_suffix(".lock")):
        # Another process may have been faster while this one waited.
        if _planned(plan.listing, source.prefix, config=config).complete:
            note(f"{source.prefix}: complete, nothing to do")
            return
        if source.is_local:
            _write(plan, work, config=config, note=note, upload=None)
            work.replace(target)
            discard_records(target)
            return
        work.mkdir(parents=True, exist_ok=True)
        upload = Upload(work, source.prefix)
        _write(plan, work, config=config, note=note, upload=upload)
        upload(ABOUT_NAME)
        upload(INDEX_NAME)
        shutil.rmtree(work)


def _write(
    plan: _Plan,
    work: Path,
    *,
    config: IngestConfig,
    note: Callable[[str], None],
    upload: Upload | None,
) -> None:
    parts, listing = plan.parts, plan.listing
    progress = Progress(parts, note=note)
    finished: list[FinishedShard] = []
    try:
        for shard in write_shards(parts, work, resize=config.resize, workers=config.workers):
            if upload and shard.entry:
                _upload_once(upload, work, shard.entry["raw_data"]["basename"])
            finished.append(shard)
            progress(shard)
    except BrokenProcessPool as error:
        raise BrokenIngestError(
            "A process that was writing shards died, perhaps for want of memory. Run the same "
            "command again to go on, with fewer --workers if it happens again."
        ) from error
    finished.sort(key=lambda shard: shard.number)
    skipped = sorted(image for shard in finished for image in shard.skipped)
    if len(skipped) > config.max_skipped_share * len(listing.images):
        name, reason = skipped[0]
        raise BadDataError(
            f"{len(skipped)} of {len(listing.images)} images cannot be decoded, more than "
            f"max_skipped_share={config.max_skipped_share}; the first is {name} ({reason}). Remove "
            "or repair them, or raise --max-skipped-share."
        )
    entries = [shard.entry for shard in finished if shard.entry]
    if not entries:
        raise EmptyDatasetError("None of the images can be decoded.")
    about = {"plan": plan.digest, "classes": listing.classes, "skipped": skipped}
    (work / ABOUT_NAME).write_text(json.dumps(about, indent=1))
    (work / INDEX_NAME).write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))


def _upload_once(upload: Upload, work: Path, name: str) -> None:
    """Upload a shard, unless an earlier start of this ingest did; its bytes are then freed."""
    shard = work / name
    if shard.exists():
        upload(name)
        shard.unlink(missing_ok=True)


def _about(source: Source) -> dict[str, Any]:
    """Read what an earlier ingest said of itself; empty for a dataset of other origin."""
    try:
        return dict(json.loads(source.read(ABOUT_NAME)))
    except FileNotFoundError:
        return {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    default = IngestConfig()
    parser.add_argument("source", type=Path, help="folder of class folders or class .tar archives")
    parser.add_argument("prefix", help="local folder or s3:// URL; /train and /test are added")
    parser.add_argument("--split", default="train", help="split to write (%(default)s)")
    parser.add_argument(
        "--hold-out", type=float, default=0.0, help="share of each class that goes to /test"
    )
    parser.add_argument("--classes", type=Path, help="class names in label order, one a line")
    parser.add_argument("--image-size", type=int, help="resize and crop; default: keep the bytes")
    parser.add_argument("--encoding", choices=("jpeg", "png"), default="jpeg")
    parser.add_argument("--shard-mib", type=int, default=default.shard_bytes >> 20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of order and hold-out")
    parser.add_argument("--max-skipped-share", type=float, default=default.max_skipped_share)
    parser.add_argument("--work-dir", type=Path, default=default.work_dir)


def run(options: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Carry out a parsed command line."""
    if not 0 <= options.hold_out < 1:
        raise IngestSettingError(f"--hold-out {options.hold_out} must lie in [0, 1).")
    if options.hold_out and options.split == "test":
        raise IngestSettingError(
            f"--hold-out {options.hold_out} goes to the split test, where --split test sends the "
            "other images. Leave one of the two away."
        )
    config = IngestConfig(
        resize=(
            None
            if options.image_size is None
            else Resize(image_size=options.image_size, encoding=options.encoding)
        ),
        shard_bytes=options.shard_mib << 20,
        workers=options.workers,
        seed=options.seed,
        max_skipped_share=options.max_skipped_share,
        work_dir=options.work_dir,
    )
    classes = read_class_names(options.classes) if options.classes else None
    listing = list_images(options.source, classes=classes)
    note(f"{len(listing.images):,} images of {len(listing.classes)} classes in {options.source}")
    root = options.prefix.rstrip("/")
    plans = [
        _planned(images, f"{root}/{split}", config=config)
        for split, images in _splits(listing, options).items()
    ]
    for plan in plans:
        prefix = plan.source.prefix
        _carry_out(plan, config=config, note=lambda text: note(f"{prefix}: {text}"))  # noqa: B023
    return 0


def _splits(listing: Listing, options: argparse.Namespace) -> dict[str, Listing]:
    if not options.hold_out:
        return {options.split: listing}
    kept, held = hold_out(listing, share=options.hold_out, seed=options.seed)
    for split, part in ((options.split, kept), ("test", held)):
        if not part.images:
            raise IngestSettingError(
                f"--hold-out {options.hold_out} leaves no images for {split}: of the "
                f"{len(listing.images)} images of {len(listing.classes)} classes it takes the "
                "share of each class, rounded. Choose another share; nothing was written."
            )
    return {options.split: kept, "test": held}
