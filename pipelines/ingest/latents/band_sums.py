"""Statistics of the bands of many latents, from sums of parts of them.

Each part's sums are taken in float64 and merged without rounding, so the result depends on how the
latents are cut into parts only by the rounding within each, and not at all on who sums them when.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipelines.decode.cpu import split_bands
from pipelines.latent_record import MAX_SCALES, BandStatistics

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


def merged(parts: Iterable[Sums]) -> dict[int, tuple[BandStatistics, ...]]:
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
