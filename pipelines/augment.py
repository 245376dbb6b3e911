"""What one turn shows of a sample, by randomness that belongs to the sample and its epoch.

What is random about a sample (its crop, its latent) is a function of the run's seed, the sample and
how often it has been seen. So it does not depend on the batch, the rank or the decoder, and a
resumed run sees the same.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.domains import Checked

# These keep the numbers apart from each other and from those of the sample order.
_CROP, _POSTERIOR = 3, 5


class SampleKey(NamedTuple):
    """One turn of one sample."""

    seed: int
    """The run's seed of the data."""
    epoch: int
    """Times the run has been through all samples before."""
    sample_id: int
    """The sample."""

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Draw numbers in [0, 1) for the sample's crop, [count]."""
        return _uniforms((*self, _CROP), count)

    def normals(self, count: int) -> NDArray[np.float32]:
        """Draw standard normal numbers for the sample's latent, [count]."""
        pairs = (count + 1) // 2
        # Box-Muller: NumPy does not promise that its own normals stay the same between versions.
        unit = _uniforms((*self, _POSTERIOR), 2 * pairs)
        radius = np.sqrt(-2.0 * np.log1p(-unit[:pairs]))
        angle = 2.0 * np.pi * unit[pairs:]
        normals = np.empty(2 * pairs, dtype=np.float32)
        normals[:pairs], normals[pairs:] = radius * np.cos(angle), radius * np.sin(angle)
        return normals[:count]


def _uniforms(key: tuple[int, ...], count: int) -> NDArray[np.float64]:
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


DRAWS = 5
"""Random numbers in [0, 1) that one crop takes."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Checked):
    """How crops vary from epoch to epoch.

    Attributes:
        flip: Mirror half of the images (DiT's recipe for ImageNet).
        crop: "center" shows the central square (ADM, DiT); "random_resized" a part of random size,
            shape and place.
        min_area: Smallest area of a random part, as a share of the image.
        max_aspect: Largest ratio of the sides of a random part; 1 keeps it square.

    """

    flip: bool = False
    crop: Literal["center", "random_resized"] = "center"
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_aspect: Annotated[float, Field(ge=1)] = 4 / 3

    @property
    def random(self) -> bool:
        """Whether crops vary at all."""
        return self.flip or self.crop != "center"


@dataclass(frozen=True, kw_only=True)
class CropParams:
    """A part of an upright image.

    Attributes:
        left: First column, in pixels.
        top: First row.
        width: Columns.
        height: Rows.
        mirrored: Whether left and right are exchanged.
    """

    left: int
    top: int
    width: int
    height: int
    mirrored: bool


def crop_of(config: AugmentConfig, *, width: int, height: int, key: SampleKey | None) -> CropParams:
    """Choose the part of an image that one turn of its sample shows; see `sample_crop`."""
    numbers = None if key is None or not config.random else key.uniforms(DRAWS)
    return sample_crop(config, width=width, height=height, numbers=numbers)


def sample_crop(
    config: AugmentConfig, *, width: int, height: int, numbers: NDArray[np.float64] | None
) -> CropParams:
    """Choose the part of an image to show.

    Args:
        config: How crops vary.
        width: Columns of the upright image.
        height: Its rows.
        numbers: Numbers in [0, 1), [DRAWS]; None shows the central square, not mirrored.
    """
    if numbers is None or config.crop == "center":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        mirrored = numbers is not None and config.flip and bool(numbers[0] < 0.5)
        return CropParams(left=left, top=top, width=side, height=side, mirrored=mirrored)
    mirror, area, aspect, across, down = numbers.tolist()
    wanted = (config.min_area + area * (1 - config.min_area)) * width * height
    ratio = config.max_aspect ** (2 * aspect - 1)
    columns, rows = math.sqrt(wanted * ratio), math.sqrt(wanted / ratio)
    # A part that does not fit is made smaller, in its own shape.
    fitting = min(1.0, width / columns, height / rows)
    columns = max(1, min(width, round(columns * fitting)))
    rows = max(1, min(height, round(rows * fitting)))
    return CropParams(
        left=int(across * (width - columns + 1)),
        top=int(down * (height - rows + 1)),
        width=columns,
        height=rows,
        mirrored=config.flip and mirror < 0.5,
    )
