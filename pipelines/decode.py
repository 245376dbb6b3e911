"""What a decoder does: a batch of encoded images in, Laplacian bands on the device out.

An image is turned upright as its orientation tag says, cropped to the view chosen for it (the
central square, without augmentation), resized with an antialiased linear filter if it has another
size than asked for, and perhaps mirrored. Values become float32 in [-1, 1] and are split into bands
by 2 x 2 means.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pipelines.batch import Bands
from pipelines.errors import DataError, UnsplittableImageError
from pipelines.sample_key import SampleKey
from pipelines.view import AugmentConfig

DecoderName = Literal["dali", "pillow"]


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What images are made into.

    Attributes:
        image_size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB.
        scales: Number of Laplacian bands.
        decode_threads: Threads that decode.
        augment: How views vary from epoch to epoch.
    """

    image_size: int
    channels: Literal[1, 3] = 3
    scales: int = 2
    decode_threads: int = 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"Images have 1 or 3 channels, got {self.channels}.")
        if self.decode_threads < 1:
            raise DataError(f"decode_threads must be at least 1, got {self.decode_threads}.")
        if self.scales < 1:
            raise DataError(f"There is at least one scale, got {self.scales}.")
        step = 2 ** (self.scales - 1)
        if self.image_size < 1 or self.image_size % step:
            raise UnsplittableImageError(
                f"Images of {self.image_size} x {self.image_size} pixels cannot be split into "
                f"{self.scales} scales, because the size must be a multiple of {step}. Choose "
                f"image_size {max(step, self.image_size // step * step)}, or fewer scales."
            )


class Decoder(Protocol):
    """Turns encoded images into bands."""

    def __call__(self, images: Sequence[bytes], keys: Sequence[SampleKey] | None = None) -> Bands:
        """Decode a batch.

        Args:
            images: Whole JPEG or PNG files.
            keys: Each image's randomness; None shows the central square of each.

        Returns:
            Bands coarse to fine, each float32 [len(images), channels, h, w] and owned by the
            caller.

        Raises:
            UndecodableImageError: Names those of the images that cannot be decoded.
        """
        ...


def make_decoder(name: DecoderName, config: DecodeConfig, *, device: str) -> Decoder:
    """Make the decoder of that name.

    Args:
        name: "dali", or "pillow", the slow reference.
        config: What images are made into.
        device: "cpu" or "cuda:N".
    """
    if name == "dali":
        from pipelines.dali.images import DaliDecoder

        return DaliDecoder(config, device=device)
    if name == "pillow":
        from pipelines.cpu import PillowDecoder

        return PillowDecoder(config, device=device)
    raise DataError(f"There is no decoder {name!r}; choose 'dali' or 'pillow'.")
