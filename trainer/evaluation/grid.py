"""Sample grids: images side by side as one PNG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
