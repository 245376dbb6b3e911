"""Datasets of latents that are taken in from arrays of another program."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment import SampleKey
from pipelines.decode.contract import DrawnLatent, LatentDecodeConfig
from pipelines.decode.cpu import LatentDecoder
from pipelines.errors import BadLatentError, EmptyDatasetError
from pipelines.index import LABEL_COLUMN
from pipelines.ingest.array_files import ArrayLayout, BadArrayError, MisfitArrayError, read_array
from pipelines.ingest.latent_origin import (
    RECIPE,
    BandSums,
    Encoder,
    Origin,
    check_shard_bytes,
)
from pipelines.ingest.listing import Listing, SourceImage
from pipelines.ingest.plan import Plan, WriteConfig, check_seed, cut, plan_digest
from pipelines.ingest.source_files import in_words
from pipelines.ingest.write import Filled, Part, WriteSample
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat, Moments
from pipelines.order import permutation

_BATCH = 32  # latents whose statistics are summed at a time


@dataclass(frozen=True, kw_only=True)
class ArraysConfig(WriteConfig):
    """How arrays are taken in.

    Attributes:
        layout: What they hold.
        dtype: Type of the stored numbers.
        seed: Seed of the order of storage, which mixes the classes.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    layout: ArrayLayout
    dtype: Literal["float16", "float32"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        check_shard_bytes(self.shard_bytes)


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


def plan_arrays(source: ArraySource, prefix: str, *, config: ArraysConfig) -> Plan:
    """Plan to take in arrays, and refuse a place that cannot take the latents.

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
    listing, encoder = source.listing, source.encoder
    order = permutation(len(listing.images), config.seed)
    arrays = tuple(listing.images[place] for place in order)
    shape, example = _common_shape(source, config.layout)
    form = LatentFormat(
        dtype=config.dtype,
        views=config.layout.views,
        channels=config.layout.channels,
        size=shape[-1],
    )
    parts = cut(arrays, shard_bytes=config.shard_bytes, size=lambda _: form.sample_bytes)
    decisive = {
        "recipe": RECIPE,
        "layout": asdict(config.layout),
        "autoencoder": encoder.sha256,
        "shape": shape,
        "format": form.encoding,
        "classes": listing.classes,
    }
    origin = Origin(
        source=source.folder,
        source_sha256=None,
        count=len(arrays),
        encoder=encoder,
        precision=None,
        format=form,
    )
    return Plan(
        prefix=prefix,
        parts=parts,
        open_filler=OpenArrayFiller(
            layout=config.layout,
            shape=shape,
            example=example,
            format=form,
            scale=encoder.scale,
            shift=encoder.shift,
        ),
        config=config,
        digest=plan_digest(decisive, parts),
        classes=listing.classes,
        passed_over=listing.passed_over,
        opening=_opening(listing),
        fault="arrays cannot be used",
        documents=origin.documents,
    )


def _opening(listing: Listing) -> tuple[str, ...]:
    passed = in_words(listing.passed_over)
    told = (f"passed over: {passed}",) if passed else ()
    return (f"{len(listing.images):,} arrays to take in", *told)


def _common_shape(source: ArraySource, layout: ArrayLayout) -> tuple[tuple[int, ...], str]:
    """Find the common shape, and an array that has it.

    One array of each size in bytes is looked at, so that a mixture of shapes is found before hours
    are spent on it; the others are checked as they are read.
    """
    common: tuple[tuple[int, ...], str] | None = None
    seen: set[int] = set()
    for file in source.listing.images:
        if file.size in seen:
            continue
        try:
            shape = read_array(file).shape
        except BadArrayError:
            continue  # counted and named when its turn comes
        seen.add(file.size)
        layout.check(shape, name=file.name)
        common = common or (shape, file.name)
        if shape != common[0]:
            raise MisfitArrayError.of_two(file.name, shape, common[1], common[0])
    if common is None:
        raise EmptyDatasetError(
            f"None of the {len(source.listing.images)} arrays in {source.folder} can be used; "
            "check that they were written by numpy.save as floating-point numbers."
        )
    return common


@dataclass(frozen=True, kw_only=True)
class OpenArrayFiller:
    """Makes fillers.

    Attributes:
        layout: What the arrays hold.
        shape: Shape of all of them.
        example: Name of an array that has it.
        format: How latents are stored.
        scale: The autoencoder's own factor, for statistics.
        shift: What it subtracts before.
    """

    layout: ArrayLayout
    shape: tuple[int, ...]
    example: str
    format: LatentFormat
    scale: float
    shift: float

    def __call__(self, number: int) -> "ArrayFiller":
        """Make that of one process; all are alike."""
        return ArrayFiller(self)


class ArrayFiller:
    """Fills shards with the moments that arrays hold.

    Args:
        settings: What to make of which arrays.
    """

    def __init__(self, settings: OpenArrayFiller) -> None:
        # Sums over several threads end in other bits than those of one.
        torch.set_num_threads(1)
        self._settings = settings
        self._decoder = LatentDecoder(
            LatentDecodeConfig(
                format=settings.format, scales=1, scale=settings.scale, shift=settings.shift
            ),
            device="cpu",
        )
        self.columns: Mapping[str, str] = {
            MOMENTS_COLUMN: settings.format.encoding,
            LABEL_COLUMN: "int",
        }

    def fill(self, part: Part[SourceImage], write: WriteSample) -> Filled:
        """Write the moments of one part, but for arrays that cannot be used."""
        sums = BandSums(self._settings.format.size)
        labels: Counter[int] = Counter()
        skipped: dict[int, tuple[str, str]] = {}
        for first in range(0, len(part.samples), _BATCH):
            drawn: list[DrawnLatent] = []
            for place, file in enumerate(part.samples[first : first + _BATCH], part.first + first):
                try:
                    stored = self._make_stored(file)
                except BadArrayError as error:
                    skipped[place] = (file.name, str(error))
                    continue
                write({MOMENTS_COLUMN: stored, LABEL_COLUMN: file.label})
                labels[file.label] += 1
                drawn += _draw(stored, place=place)
            if drawn:
                sums.add(*self._decoder.decode(drawn))
        return Filled(
            skipped=tuple(skipped.values()),
            labels=tuple(sorted(labels.items())),
            noted={"skipped": list(skipped), "sums": sums.as_json()},
        )

    def _make_stored(self, file: SourceImage) -> NDArray[Any]:
        """Make one array into what is stored of it."""
        settings = self._settings
        array = read_array(file)
        if array.shape != settings.shape:
            raise MisfitArrayError.of_two(file.name, array.shape, settings.example, settings.shape)
        with np.errstate(over="ignore"):  # looked for below
            stored = settings.layout.moments(array).astype(settings.format.dtype)
        if not np.isfinite(stored).all():
            raise BadLatentError(
                f"The array {file.name} is finite, but not in {settings.format.dtype}. Use --dtype "
                "float32, or remove the file if its numbers are wrong."
            )
        return stored


def _draw(stored: NDArray[Any], *, place: int) -> Iterator[DrawnLatent]:
    """Draw from each view of what was stored."""
    for view, (mean, std) in enumerate(stored):
        normals = SampleKey(seed=0, epoch=view, sample_id=place).normals(mean.size)
        yield DrawnLatent(Moments(mean, std), normals.reshape(mean.shape))
