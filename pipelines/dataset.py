"""What the loader asks of a dataset: encoded images by sample id, grouped in shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RawImage:
    """One sample as stored.

    Attributes:
        data: The encoded image, JPEG or PNG.
        label: Class index.
        sample_id: Its place in the dataset, counted over all shards.
    """

    data: bytes
    label: int
    sample_id: int


class ImageDataset(Protocol):
    """Random access to encoded images."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard; sample ids count through the shards in this order."""
        ...

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> RawImage:
        """Read one sample.

        Args:
            sample_id: 0 <= sample_id < len(self).
        """
        ...

    def prepare(self, sample_ids: NDArray[np.int64]) -> None:
        """Bring near what is needed to read these samples soon."""
        ...

    def shard_of(self, sample_id: int) -> str:
        """Name the shard a sample lies in, for messages."""
        ...
