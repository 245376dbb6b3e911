"""Datasets of images: how they are planned, rewritten and stored."""

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from PIL import Image

from pipelines.encoded import MAX_PIXELS, BadImageError, open_image, pixels, read_image
from pipelines.errors import EmptyDatasetError, IngestSettingError, UnreadableSourceError
from pipelines.index import IMAGE_COLUMN, LABEL_COLUMN
from pipelines.ingest.inspection import DamageCheck
from pipelines.ingest.listing import Listing, SourceImage
from pipelines.ingest.plan import Plan, WriteConfig, check_seed, cut, plan_digest
from pipelines.ingest.write import IMAGE_COLUMNS, Filled, Part, WriteSample
from pipelines.order import permutation

_CHECKED_IMAGES = 64  # at a time
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
        grey = open_image(image).mode in ("1", "L", "LA", "I", "I;16")
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


@dataclass(frozen=True, kw_only=True)
class IngestConfig(WriteConfig):
    """How images are written.

    Attributes:
        resize: Size and encoding to rewrite images in; None keeps their bytes.
        seed: Seed of the order in which images are stored, which mixes the classes.
        shard_bytes: Source bytes after which a shard is closed.
    """

    resize: Resize | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


def plan_images(listing: Listing, prefix: str, *, config: IngestConfig) -> Plan:
    """Plan a dataset of images, and refuse a place that cannot take it.

    Args:
        listing: The images and the names of their classes.
        prefix: Local folder or URL of the split.
        config: How to write.

    Raises:
        EmptyDatasetError: There are no images.
        DataError: The prefix holds something else, or cannot be looked into.
    """
    if not listing.images:
        raise EmptyDatasetError(f"There are no images to write to {prefix}.")
    order = permutation(len(listing.images), config.seed)
    images = tuple(listing.images[place] for place in order)
    parts = cut(images, shard_bytes=config.shard_bytes, size=lambda image: image.size)
    return Plan(
        prefix=prefix,
        parts=parts,
        open_filler=partial(ImageFiller, resize=config.resize),
        config=config,
        digest=plan_digest(asdict(config.resize) if config.resize else None, parts),
        classes=listing.classes,
        passed_over=listing.passed_over,
        part_bytes=[sum(image.size for image in part.samples) for part in parts],
        judge_late=True,
    )


class ImageFiller:
    """Fills shards with encoded images.

    Args:
        _process: Number of the process that it works for; all are alike.
        resize: How to rewrite the images; None keeps their bytes.
    """

    columns: Mapping[str, str] = IMAGE_COLUMNS

    def __init__(self, _process: int, *, resize: Resize | None) -> None:
        self._resize = resize
        # What is rewritten has been decoded.
        self._check = None if resize else DamageCheck()

    def fill(self, part: Part[SourceImage], write: WriteSample) -> Filled:
        """Write the images of one part, but for those that cannot be decoded.

        Raises:
            UnreadableSourceError: An image is there and cannot be read.
        """
        skipped: list[tuple[str, str]] = []
        labels: Counter[int] = Counter()
        for first in range(0, len(part.samples), _CHECKED_IMAGES):
            images = part.samples[first : first + _CHECKED_IMAGES]
            read = list(self._read(images, skipped))
            problems = self._check.problems([data for _, data in read]) if self._check else {}
            for place, (image, data) in enumerate(read):
                if place in problems:
                    skipped.append((image.name, problems[place]))
                else:
                    write({IMAGE_COLUMN: data, LABEL_COLUMN: image.label})
                    labels[image.label] += 1
        return Filled(skipped=tuple(skipped), labels=tuple(sorted(labels.items())))

    def _read(
        self, images: Iterable[SourceImage], skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[SourceImage, bytes]]:
        """Give images and the bytes to store; note those that there are none of."""
        for image in images:
            try:
                data = image.read()
                yield image, self._resize(data) if self._resize else data
            except (BadImageError, FileNotFoundError) as error:
                skipped.append((image.name, str(error)))
            except OSError as error:  # of the disk, not of the image: the next start may read it
                raise UnreadableSourceError(
                    f"{image.name} cannot be read ({error}). Let this user read it, or remove it, "
                    "and run the same command again; finished shards are kept."
                ) from error
