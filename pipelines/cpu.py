"""The reference decoder: Pillow and a few lines of torch, one image after the other."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from pipelines.batch import Bands
from pipelines.decode import DecodeConfig
from pipelines.encoded import BadImageError, open_image, pixels
from pipelines.errors import UndecodableImageError
from pipelines.sample_key import SampleKey
from pipelines.view import view_of


class PillowDecoder:
    """Decodes on the host; see `pipelines.decode.Decoder` for the contract.

    Args:
        config: What images are made into.
        device: Where the bands go.
    """

    def __init__(self, config: DecodeConfig, *, device: str) -> None:
        self._config = config
        self._device = device

    def __call__(self, images: Sequence[bytes], keys: Sequence[SampleKey] | None = None) -> Bands:
        """Decode a batch."""
        decoded = []
        bad: dict[int, str] = {}
        for place, data in enumerate(images):
            own = None if keys is None else keys[place]
            try:
                decoded.append(self._decode(data, own))
            except BadImageError as error:
                bad[place] = str(error)
        if bad:
            raise UndecodableImageError(list(bad), next(iter(bad.values())))
        batch = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
        return split_bands(batch.to(self._device) / 127.5 - 1.0, scales=self._config.scales)

    def _decode(self, data: bytes, key: SampleKey | None) -> NDArray[np.float32]:
        image = pixels(open_image(data), channels=self._config.channels).astype(np.float32)
        view = view_of(self._config.augment, width=image.shape[1], height=image.shape[0], key=key)
        part = image[view.top : view.top + view.height, view.left : view.left + view.width]
        size = self._config.image_size
        shown = part if part.shape[:2] == (size, size) else _resize(part, size)
        return shown[:, ::-1] if view.mirrored else shown


def _resize(part: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Resize with an antialiased linear filter that sees the edge pixels repeated outside."""
    height, width, channels = part.shape
    margin = max(height, width) // size + 2
    padded = np.pad(part, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    box = (margin, margin, margin + width, margin + height)
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
