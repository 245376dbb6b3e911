"""The reference decoders: Pillow, NumPy and a few lines of torch, one sample after the other."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from pipelines.augment import SampleKey
from pipelines.decode.contract import Bands, DecodeConfig, Decoder, DrawnLatent, LatentDecodeConfig
from pipelines.encoded import pixels, read_image


class PillowDecoder(Decoder[NDArray[np.float32]]):
    """Decodes on the host; see `contract.Decoder`.

    Args:
        config: What images are made into.
        device: Where the bands go.
    """

    def __init__(self, config: DecodeConfig, *, device: str) -> None:
        self._config = config
        self._device = device

    def prepare(self, sample: bytes, key: SampleKey | None) -> NDArray[np.float32]:
        """Decode one image and crop it; values are 0 to 255, [size, size, channels]."""
        image = pixels(read_image(sample), channels=self._config.channels)
        crop = self._config.crop(width=image.shape[1], height=image.shape[0], key=key)
        part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        shown, size = part.astype(np.float32), self._config.image_size
        if shown.shape[:2] != (size, size):
            shown = _resize(shown, size)
        return shown[:, ::-1] if crop.mirrored else shown

    def decode(self, prepared: Sequence[NDArray[np.float32]]) -> Bands:
        """Normalise and split a batch."""
        batch = torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2).contiguous()
        return split_bands(batch.to(self._device) / 127.5 - 1.0, scales=self._config.scales)


class LatentDecoder(Decoder[DrawnLatent]):
    """Draws latents with NumPy and splits them with torch; see `contract.Decoder`.

    Args:
        config: What latents are made into.
        device: Where the bands go.
    """

    def __init__(self, config: LatentDecodeConfig, *, device: str) -> None:
        self._config = config
        self._device = device

    def prepare(self, sample: bytes, key: SampleKey | None) -> DrawnLatent:
        """Look up the moments of a latent, and draw the numbers it is sampled by."""
        return self._config.draw(sample, key)

    def decode(self, prepared: Sequence[DrawnLatent]) -> Bands:
        """Sample, scale and split a batch."""
        latents = [
            mean.astype(np.float32)
            if normals is None
            else mean.astype(np.float32) + std.astype(np.float32) * normals
            for (mean, std), normals in prepared
        ]
        batch = torch.from_numpy(np.stack(latents)).to(self._device)
        scaled = (batch - self._config.shift) * self._config.scale
        return split_bands(scaled, scales=self._config.scales)


def _resize(part: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Resize with an antialiased linear filter that sees the edge pixels repeated outside."""
    height, width, channels = part.shape
    above, left = height // size + 2, width // size + 2
    padded = np.pad(part, ((above, above), (left, left), (0, 0)), mode="edge")
    box = (left, above, left + width, above + height)
    planes = [
        Image.fromarray(padded[..., channel]).resize(
            (size, size), Image.Resampling.BILINEAR, box=box
        )
        for channel in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def split_bands(images: Tensor, *, scales: int) -> Bands:
    """Split images [b, c, h, w] into Laplacian bands, coarse to fine."""
    bands = []
    for _ in range(scales - 1):
        coarse = avg_pool2d(images, 2)
        bands.append(images - interpolate(coarse, scale_factor=2, mode="nearest"))
        images = coarse
    return (images, *reversed(bands))
