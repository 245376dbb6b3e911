"""What the loader asks of a dataset: samples by their id, grouped in shards."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class RawSample(NamedTuple):
    """One sample as stored."""

    data: bytes
    """An encoded image (JPEG or PNG), or the moments of a latent."""
    label: int
    """Class index."""
    sample_id: int
    """Its place in the dataset, counted over all shards."""


class SampleDataset(Protocol):
    """Random access to stored samples."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard; sample ids count through the shards in this order."""
        ...

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> RawSample:
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
