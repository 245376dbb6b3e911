"""Encoded images: what they say of themselves, and the plain pixels they stand for.

This is where hostile images stop: only JPEG and PNG are opened, and an image that would need more
memory than any photograph is refused by the size in its header, before anything is decoded.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.errors import BadSampleError

MAX_PIXELS = 89_478_485  # 256 MiB of RGB; from here on Pillow itself warns of a bomb
_FORMATS = ("JPEG", "PNG")
_PNG_BIT_DEPTH = 24  # place of that byte in the file
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = range(5, 9)  # its values that exchange width and height

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(BadSampleError):
    """These bytes are not a whole JPEG or PNG image of sane size."""


def open_image(data: bytes) -> Image.Image:
    """Read an image's header.

    Raises:
        BadImageError: It is not JPEG or PNG, or it is too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its own text is an address in memory
        raise BadImageError("these bytes are no JPEG or PNG") from error
    except Exception as error:  # Pillow raises many kinds for damaged headers
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def orientation(image: Image.Image) -> int:
    """Read how an image must be turned, as EXIF numbers it: 1 is upright, 2 to 8 are not."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image when it is turned upright."""
    width, height = image.size
    return (height, width) if orientation(image) in _TURNED else (width, height)


def is_plain(image: Image.Image, data: bytes, *, channels: int) -> bool:
    """Tell whether all decoders agree on the pixels.

    That holds for 8 bit RGB and, being copied to all channels, grey. Alpha, palettes, CMYK, 16 bit
    and RGB that is to become grey are matters of convention; `pixels` settles them.
    """
    if image.format == "PNG" and (data[_PNG_BIT_DEPTH] != 8 or orientation(image) != 1):
        return False
    return image.mode == "L" or (image.mode == "RGB" and channels == 3)


def pixels(image: Image.Image, *, channels: int) -> NDArray[np.uint8]:
    """Decode an image and turn it upright.

    Alpha is dropped, and of 16 bit values the high byte is kept.

    Args:
        image: An image whose header was read.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 [height, width, channels].

    Raises:
        BadImageError: The image is damaged, for example cut short.
    """
    turned = _TRANSPOSITIONS.get(orientation(image))
    try:
        if image.mode.startswith("I"):
            high = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
            image = Image.fromarray(high)
        if turned is not None:
            image = image.transpose(turned)
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
