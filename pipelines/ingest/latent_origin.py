"""Where latents come from: the autoencoder that made them, and what latents.json says of it.

Statistics of the bands of all latents are taken from sums over the parts of a dataset. Each part's
sums are taken in float64 and merged without rounding, so the result depends on how the latents are
cut into parts only by the rounding within each, and not at all on who sums them when.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.decode.cpu import split_bands
from pipelines.errors import EmptyDatasetError, IngestSettingError
from pipelines.ingest.plan import Documents
from pipelines.ingest.write import FinishedShard
from pipelines.latent_format import LatentFormat
from pipelines.latent_record import MAX_SCALES, RECORD_NAME, BandStatistics, LatentRecord

RECIPE = 1
"""Counts up when the same settings come to give other latents."""

_MAX_SHARD_BYTES = 1 << 31

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps images [b, c, h, w] in [-1, 1] to means and standard deviations of latents, in float32."""


def check_shard_bytes(shard_bytes: int) -> None:
    """Refuse shards of latents that are too large.

    Raises:
        IngestSettingError: They are.
    """
    if shard_bytes > _MAX_SHARD_BYTES:
        raise IngestSettingError(
            f"shard_bytes={shard_bytes} must lie between 1 and {_MAX_SHARD_BYTES}."
        )


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An autoencoder to encode with.

    Attributes:
        place: Where it is.
        sha256: Digest of its architecture, scaling and weights.
        factor: Pixels for one element of a latent, along each side.
        channels: Channels of its latents.
        image_channels: Channels of the images it takes.
        scale: Factor that brings its latents near unit variance.
        shift: What is subtracted before.
        precision: What it computes in.
        load: Loads it onto "cpu" or "cuda:N"; it is pickled.
    """

    place: str
    sha256: str
    factor: int
    channels: int
    image_channels: int
    scale: float
    shift: float
    precision: Literal["fp32", "bf16"]
    load: Callable[[str], Encode]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of latents before they are written.

    Attributes:
        source: Where the images, or arrays, are.
        source_sha256: Digest of the images' index; None where the images are not known.
        count: How many there are.
        encoder: The autoencoder.
        precision: What it computed in; None where that is not known.
        format: How latents are stored.
    """

    source: str
    source_sha256: str | None
    count: int
    encoder: Encoder
    precision: Literal["fp32", "bf16"] | None
    format: LatentFormat

    def documents(self, finished: Sequence[FinishedShard]) -> Documents:
        """Give the content of latents.json.

        Args:
            finished: All shards, in their order; each has noted "skipped", the places of what it
                left out, and "sums" of its bands.

        Raises:
            EmptyDatasetError: Everything was left out.
        """
        noted = [shard.filled.noted for shard in finished]
        skipped = tuple(place for part in noted for place in part["skipped"])
        if len(skipped) == self.count:
            raise EmptyDatasetError(f"None of the images at {self.source} can be decoded.")
        encoder = self.encoder
        record = LatentRecord(
            autoencoder=encoder.place,
            autoencoder_sha256=encoder.sha256,
            encode_precision=self.precision,
            factor=encoder.factor,
            channels=encoder.channels,
            scale=encoder.scale,
            shift=encoder.shift,
            image_size=encoder.factor * self.format.size,
            views=self.format.views,
            dtype=self.format.dtype,
            source=self.source,
            source_sha256=self.source_sha256,
            samples=self.count - len(skipped),
            skipped=skipped,
            bands=_merge(part["sums"] for part in noted),
        )
        return {RECORD_NAME: record.as_json()}


Sums = Mapping[str, Sequence[Sequence[float]]]
"""For each number of scales, for each band: elements, their sum and the sum of their squares."""


def possible_scales(size: int) -> range:
    """Numbers of scales that latents of this height and width can be split into."""
    return range(1, 1 + max(k for k in range(1, MAX_SCALES + 1) if size % 2 ** (k - 1) == 0))


class BandSums:
    """Sums over the latents of one part.

    Args:
        size: Height and width of the latents.
    """

    def __init__(self, size: int) -> None:
        self._sums = {
            scales: torch.zeros(scales, 3, dtype=torch.float64) for scales in possible_scales(size)
        }

    def add(self, latents: Tensor) -> None:
        """Add latents [b, c, h, w], shifted and scaled."""
        for scales, sums in self._sums.items():
            for number, band in enumerate(split_bands(latents, scales=scales)):
                exact = band.double()
                sums[number] += torch.stack(
                    (torch.tensor(band.numel()), exact.sum(), exact.square().sum())
                )

    def as_json(self) -> Sums:
        """Give the sums in a form that a file can hold."""
        return {str(scales): sums.tolist() for scales, sums in self._sums.items()}


def _merge(parts: Iterable[Sums]) -> dict[int, tuple[BandStatistics, ...]]:
    """Take means and standard deviations over all parts, of which there is at least one."""
    all_parts = list(parts)
    return {
        int(scales): tuple(
            _statistics([part[scales][band] for part in all_parts]) for band in range(int(scales))
        )
        for scales in all_parts[0]
    }


def _statistics(sums: Sequence[Sequence[float]]) -> BandStatistics:
    count, total, squares = (math.fsum(column) for column in zip(*sums, strict=True))
    mean = total / count
    return BandStatistics(mean=mean, std=math.sqrt(max(0.0, squares / count - mean**2)))
