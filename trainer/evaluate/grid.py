"""Sample grids: images side by side as one PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor

_SHORTEST_SIDE = 32


def grid_png(images: Tensor, *, columns: int) -> bytes:
    """Lay images out row by row.

    Args:
        images: Shape [n, c, h, w] with c of 1 or 3, values in [-1, 1].
        columns: Images per row.

    Returns:
        PNG bytes; small images are enlarged without smoothing so that people can see them.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    values = (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
    canvas = np.zeros((rows * height, columns * width, channels), dtype=np.uint8)
    for index, image in enumerate(values):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
    factor = max(1, _SHORTEST_SIDE // height)
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
