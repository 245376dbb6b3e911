"""Randomness that belongs to a sample and an epoch.

What is random about a sample (its view, its latent) is a function of the run's seed, the sample and
how often it has been seen. So it does not depend on the batch, the rank or the decoder, and a
resumed run sees the same.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# These keep the numbers apart from each other and from those of the sample order.
_VIEW, _POSTERIOR = 3, 5


class SampleKey(NamedTuple):
    """One turn of one sample."""

    seed: int
    """The run's seed of the data."""
    epoch: int
    """Times the run has been through all samples before."""
    sample_id: int
    """The sample."""

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Draw numbers in [0, 1) for the sample's view, [count]."""
        return _uniforms((*self, _VIEW), count)

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
