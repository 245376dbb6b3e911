"""What the loader hands out: a batch of bands, and the cursor behind it."""

from dataclasses import dataclass

from torch import Tensor

Bands = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's slice of a global batch.

    Attributes:
        bands: Laplacian bands of the images, coarse to fine, each float32 [b, c, h, w]; their
            merged image lies in [-1, 1].
        labels: int64 [b], on the device of the bands.
        sample_ids: int64 [b], in host memory: which sample of the dataset each image is.
        skipped: How many undecodable images were replaced in this slice.
    """

    bands: Bands
    labels: Tensor
    sample_ids: Tensor
    skipped: int


@dataclass(frozen=True)
class Cursor:
    """A place in the run's stream of images: all that is needed to go on reading from there.

    Attributes:
        images: Images handed out so far, over all ranks.
    """

    images: int = 0

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"A cursor counts images from 0, got {self.images}.")
