"""Shards of latents that are read from arrays: how they are cut, and how each is filled."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment import SampleKey
from pipelines.decode.contract import DrawnLatent, LatentDecodeConfig
from pipelines.decode.cpu import LatentDecoder
from pipelines.errors import BadLatentError
from pipelines.index import LABEL_COLUMN
from pipelines.ingest.latents.arrays.layout import ArrayLayout, MisfitArrayError, read_array
from pipelines.ingest.latents.arrays.npy import BadArrayError
from pipelines.ingest.latents.band_sums import BandSums
from pipelines.ingest.listing import SourceImage
from pipelines.ingest.shard_files import Filled, WriteSample
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat, Moments

_BATCH = 32  # latents whose statistics are summed at a time


@dataclass(frozen=True, kw_only=True)
class ArrayPart:
    """What becomes one shard.

    Attributes:
        number: Place among the shards.
        first: Place of its first array among all.
        arrays: Its arrays, in the order of their ids.
    """

    number: int
    first: int
    arrays: tuple[SourceImage, ...]


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

    def fill(self, part: ArrayPart, write: WriteSample) -> Filled:
        """Write the moments of one part, but for arrays that cannot be used."""
        sums = BandSums(self._settings.format.size)
        labels: Counter[int] = Counter()
        skipped: dict[int, tuple[str, str]] = {}
        for first in range(0, len(part.arrays), _BATCH):
            drawn: list[DrawnLatent] = []
            for place, file in enumerate(part.arrays[first : first + _BATCH], part.first + first):
                try:
                    stored = self._stored(file)
                except BadArrayError as error:
                    skipped[place] = (file.name, str(error))
                    continue
                write({MOMENTS_COLUMN: stored, LABEL_COLUMN: file.label})
                labels[file.label] += 1
                drawn += _drawn(stored, place=place)
            if drawn:
                sums.add(*self._decoder.decode(drawn))
        return Filled(
            skipped=tuple(skipped.values()),
            noted={
                "skipped": list(skipped),
                "labels": sorted(labels.items()),
                "sums": sums.as_json(),
            },
        )

    def _stored(self, file: SourceImage) -> NDArray[Any]:
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


def _drawn(stored: NDArray[Any], *, place: int) -> Iterator[DrawnLatent]:
    """Draw from each view of what was stored."""
    for view, (mean, std) in enumerate(stored):
        normals = SampleKey(seed=0, epoch=view, sample_id=place).normals(mean.size)
        yield DrawnLatent(Moments(mean, std), normals.reshape(mean.shape))


def cut(
    arrays: Sequence[SourceImage], *, sample_bytes: int, shard_bytes: int
) -> tuple[ArrayPart, ...]:
    """Cut arrays into parts of at most ``shard_bytes`` of latents, one latent at least."""
    step = max(1, shard_bytes // sample_bytes)
    return tuple(
        ArrayPart(number=number, first=first, arrays=tuple(arrays[first : first + step]))
        for number, first in enumerate(range(0, len(arrays), step))
    )
