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
    values = (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
    large = values.repeat(factor, axis=2).repeat(factor, axis=3).transpose(0, 2, 3, 1)
    for index, image in enumerate(large):
        top = index // columns * cell_height + _GAP
        left = index % columns * cell_width + _GAP
        canvas[top : top + height * factor, left : left + width * factor] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas).save(buffer, format="PNG")
    return buffer.getvalue()


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


_MAX_BYTES = 2**30


class TakenSamples:
    """Keeps the samples as pictures, as far as there is room, and counts network evaluations.

    Args:
        whole: Keep them as they are too, all of them.
        shown: Indices of those that a grid shows, kept as they are.
        max_bytes: Size of the pictures beyond which further ones are not kept.

    Attributes:
        whole: The images [b, c, h, w] and labels [b] of each block, if they were to be kept.
    """

    def __init__(
        self, *, whole: bool = False, shown: Sequence[int] = (), max_bytes: int = _MAX_BYTES
    ) -> None:
        self.whole: list[tuple[Tensor, Tensor]] = []
        self._keep_whole = whole
        self._shown: dict[int, Tensor | None] = dict.fromkeys(shown)
        self._room_bytes = max_bytes
        self._pictures: list[NDArray[np.uint8]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._count = 0
        self._nfe = torch.zeros(0, dtype=torch.float64)

    def add(self, block: SampleBlock) -> None:
        """Take a block."""
        if self._keep_whole:
            self.whole.append((block.images, block.labels))
        for index, image in enumerate(block.images, block.first):
            if index in self._shown:
                self._shown[index] = image
        nfe = len(block.images) * torch.tensor(block.nfe, dtype=torch.float64)
        self._nfe = self._nfe + nfe if self._count else nfe
        self._count += len(block.images)
        bytes_ = (block.images * 127.5 + 127.5).round().clamp(0, 255).byte()
        pictures = (
            bytes_.permute(0, 2, 3, 1).contiguous().numpy()[: self._room_bytes // bytes_[0].nbytes]
        )
        self._pictures.append(pictures)
        self._labels.append(block.labels[: len(pictures)].numpy())
        # A later, smaller block must not follow on one that was cut.
        whole = len(pictures) == len(block.images)
        self._room_bytes = self._room_bytes - pictures.nbytes if whole else 0

    def grid(self) -> Tensor:
        """Return the images that a grid shows, [n, c, h, w], once all blocks are taken."""
        return torch.stack([image for image in self._shown.values() if image is not None])

    @property
    def nfe(self) -> tuple[float, ...]:
        """Network evaluations in each segment, averaged over the samples."""
        return tuple((self._nfe / self._count).tolist())

    def npz(self) -> bytes:
        """Pack the pictures as FID tools expect them: uint8 NHWC in arr_0, labels in arr_1."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, np.concatenate(self._pictures), np.concatenate(self._labels))
        return buffer.getvalue()
