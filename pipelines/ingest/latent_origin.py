"""Where latents come from: the autoencoder that made them, and what latents.json says of it.

Statistics of the bands of all latents are taken from sums over the parts of a dataset. Each part's
sums are taken in float64 and merged without rounding, so the result depends on how the latents are
cut into parts only by the rounding within each, and not at all on who sums them when.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from pipelines.augment import SampleKey
from pipelines.decode.contract import DrawnLatent, LatentDecodeConfig
from pipelines.decode.cpu import LatentDecoder, split_bands
from pipelines.errors import EmptyDatasetError
from pipelines.index import LABEL_COLUMN
from pipelines.ingest.latent_config import Encoder
from pipelines.ingest.plan import Documents
from pipelines.ingest.write import Filled, FinishedShard, WriteSample
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat, Moments
from pipelines.latent_record import MAX_SCALES, RECORD_NAME, BandStatistics, LatentRecord

RECIPE = 1
"""Counts up when the same settings come to give other latents."""


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


class LatentPart:
    """The latents of one part: written, counted, and summed up band by band.

    Args:
        write: Takes each sample.
        form: How latents are stored.
        encoder: What made them.
    """

    def __init__(self, write: WriteSample, *, form: LatentFormat, encoder: Encoder) -> None:
        self._write = write
        self._labels: Counter[int] = Counter()
        self._skipped: dict[int, tuple[str, str]] = {}
        self._decoder = LatentDecoder(
            LatentDecodeConfig(format=form, scales=1, scale=encoder.scale, shift=encoder.shift),
            device="cpu",
        )
        self._sums = {
            scales: torch.zeros(scales, 3, dtype=torch.float64)
            for scales in range(1, MAX_SCALES + 1)
            if form.size % 2 ** (scales - 1) == 0
        }

    def add(self, stored: NDArray[Any], label: int) -> None:
        """Write what is stored of one latent."""
        self._write({MOMENTS_COLUMN: stored, LABEL_COLUMN: label})
        self._labels[label] += 1

    def skip(self, place: int, name: str, reason: str) -> None:
        """Leave one out, by its place in the source."""
        self._skipped[place] = (name, reason)

    def sum(self, views: Sequence[tuple[int, int, NDArray[Any]]]) -> None:
        """Draw latents, and add up their bands.

        Args:
            views: Place in the source, number of the view, and its moments as they are stored.
        """
        drawn = []
        for place, view, (mean, std) in views:
            normals = SampleKey(seed=0, epoch=view, sample_id=place).normals(mean.size)
            drawn.append(DrawnLatent(Moments(mean, std), normals.reshape(mean.shape)))
        (latents,) = self._decoder.decode(drawn)
        for scales, sums in self._sums.items():
            for number, band in enumerate(split_bands(latents, scales=scales)):
                exact = band.double()
                sums[number] += torch.stack(
                    (torch.tensor(band.numel()), exact.sum(), exact.square().sum())
                )

    def finish(self) -> Filled:
        """Say what there is to say of the part."""
        skipped = sorted(self._skipped.items())
        sums = {str(scales): sums.tolist() for scales, sums in self._sums.items()}
        return Filled(
            skipped=tuple(named for _, named in skipped),
            labels=tuple(sorted(self._labels.items())),
            noted={"skipped": [place for place, _ in skipped], "sums": sums},
        )


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
