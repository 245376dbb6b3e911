"""Laplacian pyramid: an image as a coarse picture and the detail each finer grid adds to it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.axes import Band, Bands


class PyramidError(ValueError):
    """An image and a number of scales that do not make a pyramid."""


def down(image: Band) -> Band:
    """Halve the grid by the mean of each 2x2 block."""
    return F.avg_pool2d(image, kernel_size=2)


def up(image: Band) -> Band:
    """Double the grid by repeating each element into a 2x2 block."""
    return F.interpolate(image, scale_factor=2, mode="nearest")


def check_size(image_size: int, *, scales: int) -> None:
    """Check that a square image can be halved ``scales - 1`` times.

    Raises:
        PyramidError: ``scales`` is below 1 or ``image_size`` is not divisible by
            ``2 ** (scales - 1)``.
    """
    if scales < 1:
        raise PyramidError(f"a pyramid needs at least 1 scale, got scales={scales}.")
    factor = 2 ** (scales - 1)
    if image_size < factor or image_size % factor:
        raise PyramidError(
            f"an image of {image_size} pixels cannot be halved {scales - 1} times: its size must "
            f"be a multiple of {factor}. Use fewer scales or another image size."
        )


def split(image: Float[Tensor, "b c h w"], scales: int) -> Bands:
    """Split images into bands.

    The bands are orthogonal, every 2x2 block of a residual band sums to zero, and ``merge`` gives
    the images back.

    Args:
        image: Images whose height and width are divisible by ``2 ** (scales - 1)``.
        scales: Number of bands.

    Returns:
        The bands, coarse to fine; the last has the size of ``image``.

    Raises:
        PyramidError: The image cannot be halved that often.
    """
    for size in image.shape[-2:]:
        check_size(size, scales=scales)
    residuals: list[Tensor] = []
    for _ in range(scales - 1):
        coarse = down(image)
        residuals.append(image - up(coarse))
        image = coarse
    return (image, *reversed(residuals))


def merge(bands: Bands) -> Band:
    """Sum the bands into images, the inverse of ``split``.

    Raises:
        PyramidError: There are no bands, or one does not have twice the size of the one before.
    """
    if not bands:
        raise PyramidError("cannot merge a pyramid without bands.")
    image, *residuals = bands
    for residual in residuals:
        if residual.shape[-2:] != (2 * image.shape[-2], 2 * image.shape[-1]):
            raise PyramidError(
                f"bands of {tuple(image.shape[-2:])} and {tuple(residual.shape[-2:])} do not "
                "follow each other: each must have twice the height and width of the one before."
            )
        image = up(image) + residual
    return image


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
