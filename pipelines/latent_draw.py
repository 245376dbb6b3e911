"""Which view of a latent a turn shows, and by which normal numbers it is drawn."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.decode import LatentDecodeConfig
from pipelines.errors import BadSampleError, DataError
from pipelines.latent_format import Moments
from pipelines.sample_key import SampleKey


class DrawnLatent(NamedTuple):
    """What a latent is made of: mean + standard deviation times normal numbers."""

    moments: Moments
    """Of the view shown."""
    normals: NDArray[np.float32] | None
    """float32 [channels, size, size]; None where the mean is taken."""


def draw_latent(config: LatentDecodeConfig, sample: bytes, key: SampleKey | None) -> DrawnLatent:
    """Look up the moments of a latent and draw its normal numbers.

    Raises:
        BadSampleError: The sample is not a latent of the format.
    """
    stored = config.format
    shape = (stored.channels, stored.size, stored.size)
    mirrored = config.flip and key is not None and bool(key.uniforms(1)[0] < 0.5)
    try:
        moments = stored.moments(sample, mirrored=mirrored)
    except DataError as error:
        raise BadSampleError(str(error)) from error
    if key is None or config.posterior == "mean":
        return DrawnLatent(moments, None)
    return DrawnLatent(moments, key.normals(int(np.prod(shape))).reshape(shape))
