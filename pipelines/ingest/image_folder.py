"""Turn a folder of images into a dataset: one sub-folder or tar archive for each class, or none.

    python -m pipelines.ingest image-folder pictures s3://bucket/datasets/pictures --hold-out 0.1

Run the same command again after an interruption: finished shards are kept.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.errors import EmptyDatasetError, IngestSettingError
from pipelines.ingest.about import ABOUT_NAME, About
from pipelines.ingest.build import build, is_complete, refuse_too_many
from pipelines.ingest.image_shards import ImagePart, OpenImageFiller, cut, plan_digest
from pipelines.ingest.listing import Listing, hold_out, list_images, read_class_names
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
class _Plan:
    """What is to be written where, known before anything is."""

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
    _carry_out(_planned(listing, prefix, config=config), config=config, note=note)


def _planned(listing: Listing, prefix: str, *, config: IngestConfig) -> _Plan:
    """Plan a dataset, and refuse a place that cannot take it."""
    if not listing.images:
        raise EmptyDatasetError(f"There are no images to write to {prefix}.")
    order = permutation(len(listing.images), config.seed)
    parts = cut([listing.images[place] for place in order], shard_bytes=config.shard_bytes)
    digest = plan_digest(parts, config.resize)
    is_complete(prefix, plan=digest)
    return _Plan(prefix=prefix, listing=listing, parts=parts, digest=digest)


def _carry_out(plan: _Plan, *, config: IngestConfig, note: Callable[[str], None]) -> None:
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

    def documents(finished: Sequence[FinishedShard]) -> dict[str, object]:
        skipped = sorted(image for shard in finished for image in shard.filled.skipped)
        refuse_too_many(
            skipped, images=len(listing.images), max_skipped_share=config.max_skipped_share
        )
        about = About(
            plan=plan.digest,
            classes=listing.classes,
            images_per_class=_images_per_class(listing, skipped),
            skipped=tuple(skipped),
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


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Where the images of a source go.

    Attributes:
        root: Local folder or URL above the splits.
        split: Name of the split that is written.
        hold_out: Share of each class that goes to the split test instead.
        config: How to write.

    Raises:
        IngestSettingError: The share is out of its range, or what is held out would meet the rest.
    """

    root: str
    split: str
    hold_out: float
    config: IngestConfig

    def __post_init__(self) -> None:
        if not 0 <= self.hold_out < 1:
            raise IngestSettingError(f"--hold-out {self.hold_out} must lie in [0, 1).")
        if self.hold_out and self.split == "test":
            raise IngestSettingError(
                f"--hold-out {self.hold_out} goes to the split test, where the other images go "
                "too. Write them to another split, or leave --hold-out away."
            )

    @classmethod
    def from_options(cls, options: argparse.Namespace, *, split: str) -> "Splits":
        """Take what `add_writing_arguments` declares from a parsed command line."""
        resize = None
        if options.image_size is not None:
            resize = Resize(image_size=options.image_size, encoding=options.encoding)
        config = IngestConfig(
            resize=resize,
            shard_bytes=options.shard_mib << 20,
            workers=options.workers,
            seed=options.seed,
            max_skipped_share=options.max_skipped_share,
            work_dir=options.work_dir,
        )
        return cls(
            root=options.prefix.rstrip("/"), split=split, hold_out=options.hold_out, config=config
        )

    def write(self, listing: Listing, *, note: Callable[[str], None]) -> None:
        """Write a listing, after a look at all places it goes to.

        Raises:
            IngestSettingError: A split would be empty.
            DataError: As for `ingest`.
        """
        plans = [
            _planned(part, f"{self.root}/{split}", config=self.config)
            for split, part in self._parts(listing).items()
        ]
        for plan in plans:
            prefix = plan.prefix
            _carry_out(plan, config=self.config, note=lambda text: note(f"{prefix}: {text}"))  # noqa: B023

    def _parts(self, listing: Listing) -> dict[str, Listing]:
        if not self.hold_out:
            return {self.split: listing}
        kept, held = hold_out(listing, share=self.hold_out, seed=self.config.seed)
        for split, part in ((self.split, kept), ("test", held)):
            if not part.images:
                raise IngestSettingError(
                    f"--hold-out {self.hold_out} leaves no images for {split}: of the "
                    f"{len(listing.images)} images of {len(listing.classes)} classes it takes the "
                    "share of each class, rounded. Choose another share; nothing was written."
                )
        return {self.split: kept, "test": held}


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every command that writes images takes after its source."""
    default = IngestConfig()
    parser.add_argument("prefix", help="local folder or s3:// URL; /train and /test are added")
    parser.add_argument(
        "--hold-out", type=float, default=0.0, help="share of each class that goes to /test"
    )
    parser.add_argument("--image-size", type=int, help="resize and crop; default: keep the bytes")
    parser.add_argument("--encoding", choices=("jpeg", "png"), default="jpeg")
    parser.add_argument("--shard-mib", type=int, default=default.shard_bytes >> 20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of order and hold-out")
    parser.add_argument("--max-skipped-share", type=float, default=default.max_skipped_share)
    parser.add_argument("--work-dir", type=Path, default=default.work_dir)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "source", type=Path, help="folder of class folders, of class .tar archives, or of images"
    )
    add_writing_arguments(parser)
    parser.add_argument("--split", default="train", help="split to write (%(default)s)")
    parser.add_argument("--classes", type=Path, help="class names in label order, one a line")
    parser.add_argument(
        "--one-class",
        action="store_true",
        help="take all images for one class, whatever the folder",
    )


def run(options: argparse.Namespace, note: Callable[[str], None]) -> int:
    """Carry out a parsed command line."""
    splits = Splits.from_options(options, split=options.split)
    classes = read_class_names(options.classes) if options.classes else None
    listing = list_images(options.source, classes=classes, one_class=options.one_class)
    note(f"{listing.summary} in {options.source}")
    splits.write(listing, note=note)
    return 0
