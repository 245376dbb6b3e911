"""Making images smaller once, at ingest: short side resized, centre cropped, as DiT and ADM do."""

import io
import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from pipelines.encoded import MAX_PIXELS, opened, pixels, read_image
from pipelines.errors import IngestSettingError

_LONGEST = 64  # times the short side: what lies farther out is cut off before anything is enlarged


@dataclass(frozen=True, kw_only=True)
class Resize:
    """What images are rewritten as.

    Attributes:
        image_size: Height and width of the result, in pixels.
        encoding: "jpeg" at quality 95 without chroma subsampling, or "png", which loses nothing.

    Raises:
        IngestSettingError: The size is not positive, or larger than the images that are read.
    """

    image_size: int
    encoding: Literal["jpeg", "png"] = "jpeg"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise IngestSettingError(
                f"image_size={self.image_size} must be at least 1 pixel; without one, images keep "
                "their bytes."
            )
        if self.image_size**2 > MAX_PIXELS:
            raise IngestSettingError(
                f"image_size={self.image_size} makes images of more than {MAX_PIXELS} pixels, "
                f"which no decoder here reads; choose at most {math.isqrt(MAX_PIXELS)}."
            )

    def __call__(self, data: bytes) -> bytes:
        """Rewrite one encoded image.

        The image is halved by box means while that keeps it at least twice as large as asked for,
        then resized with a bicubic filter and cropped to its centre (the pre-processing of Dhariwal
        and Nichol 2021). Of an image that is far longer than it is wide only the middle is
        resized, so the work has a bound.

        Raises:
            BadImageError: It cannot be decoded.
        """
        image = read_image(data)
        grey = opened(image).mode in ("1", "L", "LA", "I", "I;16")
        array = pixels(image, channels=1 if grey else 3)
        picture = _middle(Image.fromarray(array[..., 0] if grey else array))
        while min(picture.size) >= 2 * self.image_size:
            width, height = picture.size
            picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
        ratio = self.image_size / min(picture.size)
        width, height = (max(self.image_size, round(side * ratio)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        picture = picture.crop((left, top, left + self.image_size, top + self.image_size))
        file = io.BytesIO()
        if self.encoding == "png":
            picture.save(file, "PNG", compress_level=6)
        else:
            picture.save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()


def _middle(picture: Image.Image) -> Image.Image:
    """Cut off the ends of a very long image."""
    longest = _LONGEST * min(picture.size)
    left, top = (max(0, side - longest) // 2 for side in picture.size)
    width, height = picture.size
    return picture.crop((left, top, width - left, height - top)) if left or top else picture
