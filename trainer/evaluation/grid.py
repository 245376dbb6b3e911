"""Sample grids: images side by side as one PNG, and what is kept of samples for them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trainer.evaluation.samples import SampleBlock

_SHORTEST_SIDE = 48
_GAP = 4
_GAP_COLOUR = 96
_MAX_CLASSES = _MAX_COLUMNS = 10


def grid_png(images: Tensor, *, columns: int) -> bytes:
    """Lay images out row by row with a gap between them.

    Args:
        images: Shape [n, c, h, w] with c of 1 or 3, values in [-1, 1].
        columns: Images per row.

    Returns:
        PNG bytes; small images are enlarged without smoothing so that people can see them.
    """
    count, channels, height, width = images.shape
    rows, factor = -(-count // columns), max(1, _SHORTEST_SIDE // height)
    cell_height, cell_width = height * factor + _GAP, width * factor + _GAP
    canvas = np.full(
        (rows * cell_height + _GAP, columns * cell_width + _GAP, channels), _GAP_COLOUR, np.uint8
    )
    large = pixels_of(images).repeat(factor, axis=1).repeat(factor, axis=2)
    for index, image in enumerate(large):
        top = index // columns * cell_height + _GAP
        left = index % columns * cell_width + _GAP
        canvas[top : top + height * factor, left : left + width * factor] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels_of(images: Tensor) -> NDArray[np.uint8]:
    """Return images [n, c, h, w] in [-1, 1] as pixels [n, h, w, c], the nearest of 0 … 255."""
    values = (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte()
    return values.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def class_grid(samples: int, *, classes: int) -> tuple[list[int], int]:
    """Choose samples to show of the first classes, one class in each row.

    Args:
        samples: How many there are; sample i shows class i mod `classes`.
        classes: Number of classes.

    Returns:
        Their indices, row by row, and the number of columns.
    """
    columns = max(1, min(_MAX_COLUMNS, samples // classes))
    chosen = [
        label + column * classes
        for label in range(min(_MAX_CLASSES, classes))
        for column in range(columns)
    ]
    return [index for index in chosen if index < samples], columns


MAX_PICTURES_BYTES = 2**30


class TakenSamples:
    """Keeps samples as pictures, as far as there is room.

    Args:
        picture_bytes: Size of a picture.
        whole: Keep them as they are too, all of them.
        shown: Indices of those that a grid shows, kept as they are.
        max_bytes: Size of all pictures beyond which further ones are not kept.

    Attributes:
        whole: The images [b, c, h, w] and labels [b] of each block, if they were to be kept.
    """

    def __init__(
        self,
        *,
        picture_bytes: int,
        whole: bool = False,
        shown: Sequence[int] = (),
        max_bytes: int = MAX_PICTURES_BYTES,
    ) -> None:
        self.whole: list[tuple[Tensor, Tensor]] = []
        self._keep_whole = whole
        self._shown: dict[int, Tensor | None] = dict.fromkeys(shown)
        self._room = max_bytes // picture_bytes
        self._pictures: list[NDArray[np.uint8]] = []
        self._labels: list[NDArray[np.int64]] = []

    def wants(self, indices: range) -> bool:
        """Tell whether any image of a block is kept."""
        return (
            self._keep_whole
            or indices.start < self._room
            or any(index in self._shown for index in indices)
        )

    def add(self, block: SampleBlock) -> None:
        """Take a block."""
        if self._keep_whole:
            self.whole.append((block.images, block.labels))
        for index, image in enumerate(block.images, block.first):
            if index in self._shown:
                self._shown[index] = image
        room = max(0, self._room - block.first)
        self._pictures.append(pixels_of(block.images[:room]))
        self._labels.append(block.labels[:room].numpy())

    def grid(self) -> Tensor:
        """Return the images that a grid shows, [n, c, h, w], once its blocks are taken."""
        return torch.stack([image for image in self._shown.values() if image is not None])

    def npz(self) -> bytes:
        """Pack the pictures as FID tools expect them: uint8 NHWC in arr_0, labels in arr_1."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, np.concatenate(self._pictures), np.concatenate(self._labels))
        return buffer.getvalue()
