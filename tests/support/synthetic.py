"""Images made on the spot, for tests and benchmarks: a dataset that reads no files."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import RawSample
from pipelines.encoded import as_png
from pipelines.errors import EmptyDatasetError


class SyntheticImages:
    """Coloured noise on a gradient, encoded as PNG; each image is a function of (seed, sample id).

    Args:
        images: How many there are.
        image_size: Height and width in pixels.
        channels: 1 or 3.
        classes: Labels count through 0, …, classes - 1.
        seed: Two datasets with the same arguments are the same.
        shard_images: Images to a pretended shard.
    """

    def __init__(
        self,
        *,
        images: int,
        image_size: int,
        channels: Literal[1, 3] = 3,
        classes: int = 10,
        seed: int = 0,
        shard_images: int = 1024,
    ) -> None:
        if images < 1:
            raise EmptyDatasetError(f"A synthetic dataset needs at least 1 image, got {images}.")
        self._images = images
        self._shape = (image_size, image_size, channels)
        self._classes = classes
        self._seed = seed
        self._shard_images = shard_images
        self._gradient = np.linspace(0, 128, image_size)[:, np.newaxis, np.newaxis]

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Images in each pretended shard."""
        full, rest = divmod(self._images, self._shard_images)
        return [self._shard_images] * full + ([rest] if rest else [])

    def __len__(self) -> int:
        return self._images

    def prepare(self, sample_ids: NDArray[np.int64]) -> None:
        """Do nothing: images are made when they are read."""

    def shard_of(self, sample_id: int) -> str:
        """Name the pretended shard of an image."""
        return f"synthetic.{sample_id // self._shard_images:05}"

    def read(self, sample_id: int) -> RawSample:
        """Make one image."""
        if not 0 <= sample_id < self._images:
            raise IndexError(f"There is no sample {sample_id}; the dataset holds {self._images}.")
        noise = np.random.default_rng((self._seed, sample_id)).integers(0, 128, self._shape)
        image = (self._gradient + noise).astype(np.uint8)
        return RawSample(as_png(image), sample_id % self._classes, sample_id)
