"""Shards of images: how a listing is cut into them, and how each is filled."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipelines.encoded import BadImageError
from pipelines.errors import UnreadableSourceError
from pipelines.index import IMAGE_COLUMN, LABEL_COLUMN
from pipelines.ingest.damage import DamageCheck
from pipelines.ingest.listing import SourceImage
from pipelines.ingest.resize import Resize
from pipelines.ingest.shard_files import Filled, WriteSample

_CHECKED_IMAGES = 64  # at a time


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """What becomes one shard.

    Attributes:
        number: Place among the shards.
        images: Its images, in the order of their ids.
    """

    number: int
    images: tuple[SourceImage, ...]


def cut(images: Sequence[SourceImage], *, shard_bytes: int) -> tuple[ImagePart, ...]:
    """Cut images into parts of at most ``shard_bytes`` of source bytes, one image at least."""
    parts: list[ImagePart] = []
    current: list[SourceImage] = []
    total = 0
    for image in images:
        if current and total + image.size > shard_bytes:
            parts.append(ImagePart(number=len(parts), images=tuple(current)))
            current, total = [], 0
        current.append(image)
        total += image.size
    return (*parts, ImagePart(number=len(parts), images=tuple(current)))


def plan_digest(parts: Sequence[ImagePart], resize: Resize | None) -> str:
    """Digest of what decides the shards: names, versions and classes of the images, and the resize.

    Where the images lie does not count, so that a moved source is the same one; a copy is, if it
    keeps the times of the files. An image that was replaced is another one, also of equal size.
    """
    digest = hashlib.sha256(json.dumps(asdict(resize) if resize else None).encode())
    for part in parts:
        for image in part.images:
            decisive = [part.number, image.name, image.size, image.label, image.version]
            digest.update(json.dumps(decisive).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class OpenImageFiller:
    """Makes fillers.

    Attributes:
        resize: How to rewrite the images; None keeps their bytes.
    """

    resize: Resize | None

    def __call__(self, number: int) -> "ImageFiller":
        """Make that of one process; all are alike."""
        return ImageFiller(self.resize)


class ImageFiller:
    """Fills shards with encoded images.

    Args:
        resize: How to rewrite the images; None keeps their bytes.
    """

    columns: Mapping[str, str] = {IMAGE_COLUMN: "bytes", LABEL_COLUMN: "int"}

    def __init__(self, resize: Resize | None) -> None:
        self._resize = resize
        # What is rewritten has been decoded.
        self._check = None if resize else DamageCheck()

    def fill(self, part: ImagePart, write: WriteSample) -> Filled:
        """Write the images of one part, but for those that cannot be decoded.

        Raises:
            UnreadableSourceError: An image is there and cannot be read.
        """
        skipped: list[tuple[str, str]] = []
        for first in range(0, len(part.images), _CHECKED_IMAGES):
            images = part.images[first : first + _CHECKED_IMAGES]
            read = list(self._read(images, skipped))
            problems = self._check.problems([data for _, data in read]) if self._check else {}
            for place, (image, data) in enumerate(read):
                if place in problems:
                    skipped.append((image.name, problems[place]))
                else:
                    write({IMAGE_COLUMN: data, LABEL_COLUMN: image.label})
        return Filled(skipped=tuple(skipped))

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
