"""A dataset of images, written from a listing of them, or gone on with after an interruption."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import EmptyDatasetError, IngestSettingError
from pipelines.ingest.about import ABOUT_NAME, About
from pipelines.ingest.build import build, is_complete, refuse_too_many
from pipelines.ingest.image_shards import ImagePart, OpenImageFiller, cut, plan_digest
from pipelines.ingest.listing import Listing
from pipelines.ingest.progress import Progress
from pipelines.ingest.resize import Resize
from pipelines.ingest.shard_files import FinishedShard, write_shards
from pipelines.order import permutation


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
class Plan:
    """What is to be written where, known before anything is.

    Attributes:
        prefix: Local folder or URL of the split.
        listing: The images and the names of their classes.
        parts: What becomes each shard.
        digest: Digest of all that decides the dataset.
    """

    prefix: str
    listing: Listing
    parts: tuple[ImagePart, ...]
    digest: str


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
    carry_out(planned(listing, prefix, config=config), config=config, note=note)


def planned(listing: Listing, prefix: str, *, config: IngestConfig) -> Plan:
    """Plan a dataset, and refuse a place that cannot take it.

    Raises:
        EmptyDatasetError: There are no images.
        DataError: The prefix holds something else, or cannot be looked into.
    """
    if not listing.images:
        raise EmptyDatasetError(f"There are no images to write to {prefix}.")
    order = permutation(len(listing.images), config.seed)
    parts = cut([listing.images[place] for place in order], shard_bytes=config.shard_bytes)
    digest = plan_digest(parts, config.resize)
    is_complete(prefix, plan=digest)
    return Plan(prefix=prefix, listing=listing, parts=parts, digest=digest)


def carry_out(plan: Plan, *, config: IngestConfig, note: Callable[[str], None]) -> None:
    """Write what is not written yet; see `ingest`."""
    listing, parts = plan.listing, plan.parts
    progress = Progress(
        [len(part.images) for part in parts],
        sizes=[sum(image.size for image in part.images) for part in parts],
        note=note,
    )

    def shards(work: Path) -> Iterator[FinishedShard]:
        return progress.follow(
            write_shards(
                parts,
                work,
                plan=plan.digest,
                open_filler=OpenImageFiller(config.resize),
                workers=config.workers,
                retry_skipped=True,
            )
        )

    def documents(finished: Sequence[FinishedShard]) -> dict[str, dict[str, Any]]:
        skipped = sorted(image for shard in finished for image in shard.filled.skipped)
        refuse_too_many(
            skipped, images=len(listing.images), max_skipped_share=config.max_skipped_share
        )
        about = About(
            plan=plan.digest,
            classes=listing.classes,
            images_per_class=_images_per_class(listing, skipped),
            skipped=tuple(skipped),
            passed_over=listing.passed_over,
        )
        return {ABOUT_NAME: asdict(about)}

    build(
        plan.prefix,
        plan=plan.digest,
        shards=shards,
        documents=documents,
        work_dir=config.work_dir,
        note=note,
    )


def _images_per_class(listing: Listing, skipped: Iterable[tuple[str, str]]) -> tuple[int, ...]:
    counts = Counter(image.label for image in listing.images)
    names = [name for name, _ in skipped]
    wanted = frozenset(names)
    label_of = {image.name: image.label for image in listing.images if image.name in wanted}
    counts.subtract(label_of[name] for name in names)
    return tuple(counts[label] for label in range(len(listing.classes)))
