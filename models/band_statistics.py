"""Mean and standard deviation of each band, which differ widely from scale to scale."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.axes import Bands


@dataclass(frozen=True, kw_only=True)
class BandStatistics:
    """Moments of each band over all its elements, coarse to fine.

    Attributes:
        mean: Means; a residual band's is 0 up to rounding, because its 2x2 blocks sum to zero.
        std: Standard deviations, of the population.
    """

    mean: Float[Tensor, "k"]
    std: Float[Tensor, "k"]


def band_statistics(bands: Bands) -> BandStatistics:
    """Measure bands on the device they are on.

    Args:
        bands: Bands of a batch, coarse to fine.
    """
    moments = [torch.std_mean(band, correction=0) for band in bands]
    return BandStatistics(
        mean=torch.stack([mean for _, mean in moments]),
        std=torch.stack([std for std, _ in moments]),
    )
