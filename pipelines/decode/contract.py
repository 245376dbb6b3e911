"""What a decoder does: a batch of stored samples in, Laplacian bands on the device out.

An image is turned upright as its orientation tag says, cropped to the part chosen for it (the
central square, without augmentation), resized with an antialiased linear filter if it has another
size than asked for, and perhaps mirrored. Values become float32 in [-1, 1] and are split into bands
by 2 x 2 means. Of latents one is drawn from the moments stored, scaled and split alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.augment import AugmentConfig, CropParams, SampleKey, crop_of
from pipelines.errors import (
    BadSampleError,
    DataError,
    UndecodableImageError,
    UnsplittableImageError,
)
from pipelines.latent_format import LatentFormat, Moments

if TYPE_CHECKING:  # who only has settings read waits for no torch
    from torch import Tensor

Bands: TypeAlias = "tuple[Tensor, ...]"
"""Laplacian bands of a batch of images, coarse to fine."""
Prepared = TypeVar("Prepared")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What images are made into.

    Attributes:
        image_size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB.
        scales: Number of Laplacian bands.
        decode_threads: Threads that decode.
        augment: How crops vary from epoch to epoch.
        whole: Show all of each image, squeezed into the square, instead of a part of it: to find
            damage wherever it is.
    """

    image_size: int
    channels: Literal[1, 3] = 3
    scales: int = 2
    decode_threads: int = 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    whole: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"Images have 1 or 3 channels, got {self.channels}.")
        if self.decode_threads < 1:
            raise DataError(f"decode_threads must be at least 1, got {self.decode_threads}.")
        check_splittable(self.image_size, self.scales, what="Images")

    def crop(self, *, width: int, height: int, key: SampleKey | None) -> CropParams:
        """Choose the part of an upright image that one turn of its sample shows."""
        if self.whole:
            return CropParams(left=0, top=0, width=width, height=height, mirrored=False)
        return crop_of(self.augment, width=width, height=height, key=key)


class DrawnLatent(NamedTuple):
    """What a latent is made of: mean + standard deviation times normal numbers."""

    moments: Moments
    """Of the view shown."""
    normals: NDArray[np.float32] | None
    """float32 [channels, size, size]; None where the mean is taken."""


@dataclass(frozen=True, kw_only=True)
class LatentDecodeConfig:
    """What stored latents are made into.

    Attributes:
        format: How they are stored.
        scales: Number of Laplacian bands.
        scale: Factor that brings latents near unit variance.
        shift: What is subtracted before.
        posterior: "sample" each latent anew, or take the "mean".
        flip: Show half of the samples mirrored.
        decode_threads: Threads that compute.

    Raises:
        DataError: Mirrored views are asked for and not stored.
        UnsplittableImageError: The latents cannot be split into so many bands.
    """

    format: LatentFormat
    scales: int
    scale: float
    shift: float
    posterior: Literal["sample", "mean"] = "sample"
    flip: bool = False
    decode_threads: int = 2

    def __post_init__(self) -> None:
        if self.flip and self.format.views < 2:
            raise DataError(
                "data.augment.flip=true needs latents of mirrored images, which this dataset does "
                "not hold. Encode it again without --no-flips, or set data.augment.flip=false."
            )
        check_splittable(self.format.size, self.scales, what="Latents")

    def draw(self, sample: bytes, key: SampleKey | None) -> DrawnLatent:
        """Look up the moments of a stored latent, and draw the normal numbers of one turn of it.

        Raises:
            BadSampleError: The sample is not a latent of the format.
        """
        shape = (self.format.channels, self.format.size, self.format.size)
        mirrored = self.flip and key is not None and bool(key.uniforms(1)[0] < 0.5)
        try:
            moments = self.format.moments(sample, mirrored=mirrored)
        except DataError as error:
            raise BadSampleError(str(error)) from error
        if key is None or self.posterior == "mean":
            return DrawnLatent(moments, None)
        return DrawnLatent(moments, key.normals(int(np.prod(shape))).reshape(shape))


def decode_threads(processes: int) -> int:
    """Share the machine's cores among so many processes that decode: 1 to 8 threads for each.

    More bring nothing to a GPU's decoder, nor to a batch of a few images.
    """
    return max(1, min(8, (os.cpu_count() or 1) // processes))


class Decoder(Protocol[Prepared]):
    """Turns stored samples into bands, in two steps that a loader can run in different threads.

    Subclasses say what the steps do; calling a decoder takes both.
    """

    def prepare(self, sample: bytes, key: SampleKey | None) -> Prepared:
        """Check one sample on the host, and choose what is random about it.

        Args:
            sample: A whole JPEG or PNG file, or the moments of a latent.
            key: The sample's randomness; None takes the central square of an image, and the mean
                of a latent.

        Raises:
            BadSampleError: It cannot be decoded.
        """
        ...

    def decode(self, prepared: Sequence[Prepared]) -> Bands:
        """Decode a batch.

        Returns:
            Bands coarse to fine, each float32 [len(prepared), channels, h, w] and owned by the
            caller.

        Raises:
            UndecodableImageError: Names those that turn out not to be decodable after all.
        """
        ...

    def __call__(
        self, samples: Sequence[bytes], keys: Sequence[SampleKey | None] | None = None
    ) -> Bands:
        """Prepare and decode a batch.

        Raises:
            UndecodableImageError: Names those of the samples that cannot be decoded.
        """
        prepared = []
        bad: dict[int, str] = {}
        for place, sample in enumerate(samples):
            try:
                prepared.append(self.prepare(sample, None if keys is None else keys[place]))
            except BadSampleError as error:
                bad[place] = str(error)
        if bad:
            raise UndecodableImageError(list(bad), next(iter(bad.values())))
        return self.decode(prepared)


def check_splittable(size: int, scales: int, *, what: str) -> None:
    """Refuse a size that cannot be halved once for each scale but the first.

    Raises:
        DataError: There is no scale at all.
        UnsplittableImageError: The size cannot be halved so often.
    """
    if scales < 1:
        raise DataError(f"There is at least one scale, got {scales}.")
    step = 2 ** (scales - 1)
    if size < 1 or size % step:
        raise UnsplittableImageError(
            f"{what} of {size} x {size} pixels cannot be split into {scales} scales, because the "
            f"size must be a multiple of {step}. Choose image_size "
            f"{max(step, size // step * step)}, or fewer scales."
        )
