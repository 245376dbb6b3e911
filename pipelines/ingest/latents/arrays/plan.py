"""Write a dataset of latents from arrays, or go on with one begun earlier."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import EmptyDatasetError, IngestSettingError
from pipelines.ingest.build import build, is_complete, refuse_too_many
from pipelines.ingest.entry import in_words
from pipelines.ingest.latents.arrays.layout import ArrayLayout, MisfitArrayError, read_array
from pipelines.ingest.latents.arrays.npy import BadArrayError
from pipelines.ingest.latents.arrays.shards import OpenArrayFiller, cut
from pipelines.ingest.latents.documents import Origin
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.listing import Listing, hold_out
from pipelines.ingest.progress import Progress
from pipelines.ingest.shard_files import FinishedShard, write_shards
from pipelines.latent_format import LatentFormat
from pipelines.order import permutation

_RECIPE = 1  # counts up when the same settings come to give other latents
_MAX_SHARD_BYTES = 1 << 31


@dataclass(frozen=True, kw_only=True)
class ArraysConfig:
    """How arrays are taken in.

    Attributes:
        layout: What they hold.
        dtype: Type of the stored numbers.
        hold_out: Share of each class that goes to the split test instead.
        seed: Seed of what is held out, and of the order of storage, which mixes the classes.
        workers: Processes.
        shard_bytes: Size of a shard of latents, about.
        max_skipped_share: Share of the arrays that may be left out for being damaged.
        work_dir: Folder for unfinished shards of a remote dataset.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    layout: ArrayLayout
    dtype: Literal["float16", "float32"] = "float16"
    hold_out: float = 0.0
    seed: int = 0
    workers: int = 2
    shard_bytes: int = 1 << 26
    max_skipped_share: float = 0.01
    work_dir: Path = Path("~/.cache/lapflow/ingest")

    def __post_init__(self) -> None:
        for name in ("hold_out", "max_skipped_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise IngestSettingError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        if self.seed < 0:
            raise IngestSettingError(f"seed={self.seed} must be 0 or more.")
        if self.workers < 1:
            raise IngestSettingError(f"workers={self.workers} must be at least 1.")
        if not 1 <= self.shard_bytes <= _MAX_SHARD_BYTES:
            raise IngestSettingError(
                f"shard_bytes={self.shard_bytes} must lie between 1 and {_MAX_SHARD_BYTES}."
            )


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """Arrays, and what made them.

    Attributes:
        folder: Where they are.
        listing: All of them, or those of one split.
        encoder: The autoencoder.
    """

    folder: str
    listing: Listing
    encoder: Encoder


def split_apart(listing: Listing, *, split: str, config: ArraysConfig) -> dict[str, Listing]:
    """Say which arrays go to which split.

    Raises:
        IngestSettingError: A split would be empty, meet the other one, or have no name.
    """
    if not split or "/" in split:
        raise IngestSettingError(f"--split {split} is no name. Give one, such as train.")
    if not config.hold_out:
        return {split: listing}
    if split == "test":
        raise IngestSettingError(
            f"--hold-out {config.hold_out} goes to the split test, where the other arrays go too. "
            "Write them to another split, or leave --hold-out away."
        )
    kept, held = hold_out(listing, share=config.hold_out, seed=config.seed)
    for name, part in ((split, kept), ("test", held)):
        if not part.images:
            raise IngestSettingError(
                f"--hold-out {config.hold_out} leaves no arrays for {name}: of the "
                f"{len(listing.images)} arrays of {len(listing.classes)} classes it takes the "
                "share of each class, rounded. Choose another share; nothing was written."
            )
    return {split: kept, "test": held}


class ArrayPlan:
    """What is to be written to where, known before anything is.

    Args:
        source: The arrays of one split.
        prefix: Prefix of the latents.
        config: How to take them in.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        MisfitArrayError: The arrays have other shapes than they should, or several.
        EmptyDatasetError: None of them can be used.
        DataError: The source cannot be read, or the prefix not be looked into.
    """

    def __init__(self, source: ArraySource, prefix: str, *, config: ArraysConfig) -> None:
        self._source = source
        self._prefix = prefix
        self._config = config
        listing = source.listing
        order = permutation(len(listing.images), config.seed)
        self._arrays = [listing.images[place] for place in order]
        shape, example = self._shape()
        self._format = LatentFormat(
            dtype=config.dtype,
            views=config.layout.views,
            channels=config.layout.channels,
            size=shape[-1],
        )
        self._parts = cut(
            self._arrays,
            sample_bytes=self._format.sample_bytes,
            shard_bytes=config.shard_bytes,
        )
        self._filler = OpenArrayFiller(
            layout=config.layout,
            shape=shape,
            example=example,
            format=self._format,
            scale=source.encoder.scale,
            shift=source.encoder.shift,
        )
        self._digest = self._plan_digest()
        is_complete(prefix, plan=self._digest)

    def carry_out(self, note: Callable[[str], None]) -> None:
        """Write what is not written yet.

        Args:
            note: Takes lines for the user.

        Raises:
            MisfitArrayError: An array has another shape than the others.
            BadDataError: Too many arrays are damaged; what is finished is kept.
            BadLatentError: Numbers cannot be stored in the type chosen.
            BrokenIngestError: A process died.
            DataError: The source cannot be read, or the prefix not be written.
        """
        origin = Origin(
            plan=self._digest,
            source=self._source.folder,
            source_sha256=None,
            count=len(self._arrays),
            classes=self._source.listing.classes,
            encoder=self._source.encoder,
            precision=None,
            format=self._format,
            passed_over=self._source.listing.passed_over,
        )
        build(
            self._prefix,
            plan=self._digest,
            shards=lambda work: self._shards(work, note),
            documents=origin.documents,
            work_dir=self._config.work_dir,
            note=note,
        )

    def _shape(self) -> tuple[tuple[int, ...], str]:
        """Find the common shape, and an array that has it.

        One array of each size in bytes is looked at, so that a mixture of shapes is found before
        hours are spent on it; the others are checked as they are read.
        """
        common: tuple[tuple[int, ...], str] | None = None
        seen: set[int] = set()
        for file in self._source.listing.images:
            if file.size in seen:
                continue
            try:
                shape = read_array(file).shape
            except BadArrayError:
                continue  # counted and named when its turn comes
            seen.add(file.size)
            self._config.layout.check(shape, name=file.name)
            common = common or (shape, file.name)
            if shape != common[0]:
                raise MisfitArrayError.of_two(file.name, shape, common[1], common[0])
        if common is None:
            raise EmptyDatasetError(
                f"None of the {len(self._arrays)} arrays in {self._source.folder} can be used; "
                "check that they were written by numpy.save as floating-point numbers."
            )
        return common

    def _plan_digest(self) -> str:
        """Digest of all that decides the latents: names, versions and classes of the arrays."""
        decisive = {
            "recipe": _RECIPE,
            "layout": asdict(self._config.layout),
            "autoencoder": self._source.encoder.sha256,
            "shape": self._filler.shape,
            "format": self._format.encoding,
            "classes": self._source.listing.classes,
        }
        digest = hashlib.sha256(json.dumps(decisive).encode())
        for part in self._parts:
            for file in part.arrays:
                one = [part.number, file.name, file.size, file.label, file.version]
                digest.update(json.dumps(one).encode())
        return digest.hexdigest()

    def _shards(self, work: Path, note: Callable[[str], None]) -> Iterator[FinishedShard]:
        note(f"{len(self._arrays):,} arrays to take in")
        if self._source.listing.passed_over:
            note(f"passed over: {in_words(self._source.listing.passed_over)}")
        finished = write_shards(
            self._parts,
            work,
            plan=self._digest,
            open_filler=self._filler,
            workers=self._config.workers,
            retry_skipped=True,
        )
        skipped: list[tuple[str, str]] = []
        progress = Progress([len(part.arrays) for part in self._parts], note=note)
        for shard in progress.follow(finished):
            skipped += shard.filled.skipped
            refuse_too_many(
                skipped,
                images=len(self._arrays),
                max_skipped_share=self._config.max_skipped_share,
                fault="arrays cannot be used",
            )
            yield shard
