"""How the latents of an autoencoder lie in a dataset: one array of moments for each sample.

The encoder of a variational autoencoder gives a normal distribution for each element of a latent.
Its mean and standard deviation are stored, and a latent is drawn from them each time the sample is
read. Latents of mirrored images, which are not mirrored latents, are stored as a second view.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError

MOMENTS_COLUMN = "moments"

_ENCODING = re.compile(r"ndarray:(float16|float32):([12]),2,(\d{1,4}),(\d{1,4}),(\d{1,4})")


class Moments(NamedTuple):
    """The distribution of one latent."""

    mean: NDArray[Any]
    """[channels, size, size], of the autoencoder's latents before shift and scale."""
    std: NDArray[Any]
    """The same of standard deviations."""


@dataclass(frozen=True, kw_only=True)
class LatentFormat:
    """Shape and type of a dataset's latents.

    Attributes:
        dtype: Type of the stored numbers.
        views: 2 if mirrored images were encoded too, else 1.
        channels: Channels of a latent.
        size: Its height and width.
    """

    dtype: Literal["float16", "float32"]
    views: Literal[1, 2]
    channels: int
    size: int

    @classmethod
    def parse(cls, encoding: str) -> "LatentFormat | None":
        """Read an MDS encoding; None if it is not one of square latents."""
        match = _ENCODING.fullmatch(encoding)
        if match is None:
            return None
        dtype, views, channels, height, width = match.groups()
        if int(channels) < 1 or int(height) < 1 or height != width:
            return None
        return cls(
            dtype="float16" if dtype == "float16" else "float32",
            views=1 if views == "1" else 2,
            channels=int(channels),
            size=int(height),
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Views, moments (mean, standard deviation), channels, height and width."""
        return self.views, 2, self.channels, self.size, self.size

    @property
    def encoding(self) -> str:
        """Name of the format in an index of shards."""
        return f"ndarray:{self.dtype}:{','.join(map(str, self.shape))}"

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def moments(self, data: bytes, *, mirrored: bool) -> Moments:
        """Look at one view of a stored sample.

        Raises:
            DataError: The bytes are of another length, or hold numbers that no encoder gives.
        """
        if len(data) != self.sample_bytes:
            raise DataError(f"it has {len(data)} bytes instead of {self.sample_bytes}")
        views = np.frombuffer(data, dtype=self.dtype).reshape(self.shape)
        mean, std = views[1 if mirrored else 0]
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
            raise DataError("its moments are not finite, or deviations are negative")
        return Moments(mean, std)
