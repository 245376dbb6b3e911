"""Encoded images: what they say of themselves, and the plain pixels they stand for.

This is where hostile images stop: only JPEG and PNG are opened, and an image that would need more
memory than any photograph is refused by the size in its header, before anything is decoded.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 89_478_485  # 256 MiB of RGB; from here on Pillow itself warns of a bomb
_FORMATS = ("JPEG", "PNG")
_PNG_BIT_DEPTH = 24  # place of that byte in the file


class BadImageError(Exception):
    """These bytes are not a whole JPEG or PNG image of sane size."""


def open_image(data: bytes) -> Image.Image:
    """Read an image's header.

    Raises:
        BadImageError: It is not JPEG or PNG, or it is too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # Pillow raises many kinds for damaged headers
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def is_plain(image: Image.Image, data: bytes, *, channels: int) -> bool:
    """Tell whether all decoders agree on the pixels.

    That holds for 8 bit RGB and, being copied to all channels, grey. Alpha, palettes, CMYK, 16 bit
    and RGB that is to become grey are matters of convention; `pixels` settles them.
    """
    if image.format == "PNG" and data[_PNG_BIT_DEPTH] != 8:
        return False
    return image.mode == "L" or (image.mode == "RGB" and channels == 3)


def pixels(image: Image.Image, *, channels: int) -> NDArray[np.uint8]:
    """Decode an image.

    Alpha is dropped, and of 16 bit values the high byte is kept.

    Args:
        image: An image whose header was read.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 [height, width, channels].

    Raises:
        BadImageError: The image is damaged, for example cut short.
    """
    try:
        if image.mode.startswith("I"):
            high = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
            image = Image.fromarray(high)
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # as above
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    return array.reshape(image.height, image.width, channels)


def as_png(array: NDArray[np.uint8]) -> bytes:
    """Encode pixels [height, width, 1 or 3] as a plain PNG, quickly rather than small."""
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(
        file, "PNG", compress_level=1
    )
    return file.getvalue()
