"""The splits that a source of images goes to: one, or one and what is held out of it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import IngestSettingError
from pipelines.ingest.image_dataset import IngestConfig, carry_out, planned
from pipelines.ingest.listing import Listing, hold_out
from pipelines.ingest.resize import Resize
from pipelines.source import is_url


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Where the images of a source go.

    Attributes:
        root: Local folder or URL above the splits.
        split: Name of the split that is written.
        hold_out: Share of each class that goes to the split test instead.
        config: How to write.
        way_out: What else could be done about classes too small to hold some of each out, as a
            sentence.

    Raises:
        IngestSettingError: The share is out of its range, or what is held out would meet the rest.
        LocationError: The root is a mistyped URL.
    """

    root: str
    split: str
    hold_out: float
    config: IngestConfig
    way_out: str = ""

    def __post_init__(self) -> None:
        is_url(self.root)  # refused before a source is listed
        if not 0 <= self.hold_out < 1:
            raise IngestSettingError(f"--hold-out {self.hold_out} must lie in [0, 1).")
        if self.hold_out and self.split == "test":
            raise IngestSettingError(
                f"--hold-out {self.hold_out} goes to the split test, where the other images go "
                "too. Write them to another split, or leave --hold-out away."
            )

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, *, split: str, way_out: str = ""
    ) -> "Splits":
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
            root=options.prefix.rstrip("/"),
            split=split,
            hold_out=options.hold_out,
            config=config,
            way_out=way_out,
        )

    def write(self, listing: Listing, *, note: Callable[[str], None]) -> None:
        """Write a listing, after a look at all places it goes to.

        Raises:
            IngestSettingError: A split would be empty.
            DataError: As for `ingest`.
        """
        plans = [
            planned(part, f"{self.root}/{split}", config=self.config)
            for split, part in self._parts(listing).items()
        ]
        for plan in plans:
            prefix = plan.prefix
            carry_out(plan, config=self.config, note=lambda text: note(f"{prefix}: {text}"))  # noqa: B023

    def _parts(self, listing: Listing) -> dict[str, Listing]:
        if not self.hold_out:
            return {self.split: listing}
        kept, held = hold_out(listing, share=self.hold_out, seed=self.config.seed)
        for split, part in ((self.split, kept), ("test", held)):
            if not part.images:
                raise IngestSettingError(
                    f"--hold-out {self.hold_out} leaves no images for {split}: of the "
                    f"{len(listing.images)} images of {len(listing.classes)} classes it takes the "
                    f"share of each class, rounded. Choose another share{self.way_out}; nothing "
                    "was written."
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
