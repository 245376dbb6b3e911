"""The plain pixels that encoded images of every kind stand for."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.encoded import BadImageError, EncodedImage

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def opened(image: EncodedImage) -> Image.Image:
    """Open an image with Pillow, which decodes nothing yet.

    Raises:
        BadImageError: Pillow does not know that kind, or its header is damaged.
    """
    try:
        return Image.open(io.BytesIO(image.data), formats=(image.format,))
    except UnidentifiedImageError as error:  # its own text is an address in memory
        raise BadImageError(f"this kind of {image.format} is not known") from error
    except Exception as error:  # Pillow raises many kinds for damaged headers
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def pixels(image: EncodedImage, *, channels: int) -> NDArray[np.uint8]:
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
    picture = opened(image)
    turned = _TRANSPOSITIONS.get(image.orientation)
    try:
        if picture.mode.startswith("I"):
            high = (np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)
            picture = Image.fromarray(high)
        if turned is not None:
            picture = picture.transpose(turned)
        array = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # as above
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    return array.reshape(picture.height, picture.width, channels)


def as_png(array: NDArray[np.uint8]) -> bytes:
    """Encode pixels [height, width, 1 or 3] as a plain PNG, quickly rather than small."""
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(
        file, "PNG", compress_level=1
    )
    return file.getvalue()
