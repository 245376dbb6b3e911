"""Shards of images: how a listing is cut into them, and how each is filled."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipelines.encoded import BadImageError
from pipelines.errors import UnreadableSourceError
from pipelines.index import IMAGE_COLUMN, LABEL_COLUMN
from pipelines.ingest.listing import SourceImage
from pipelines.ingest.resize import Resize, checked
from pipelines.ingest.shard_files import Filled, WriteSample


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
        return ImageFiller(self.resize or checked)


class ImageFiller:
    """Fills shards with encoded images.

    Args:
        encode: Turns the bytes of a source image into those that are stored.
    """

    columns: Mapping[str, str] = {IMAGE_COLUMN: "bytes", LABEL_COLUMN: "int"}

    def __init__(self, encode: Callable[[bytes], bytes]) -> None:
        self._encode = encode

    def fill(self, part: ImagePart, write: WriteSample) -> Filled:
        """Write the images of one part, but for those that cannot be decoded.

        Raises:
            UnreadableSourceError: An image is there and cannot be read.
        """
        skipped = []
        for image in part.images:
            try:
                data = self._encode(image.read())
            except (BadImageError, FileNotFoundError) as error:
                skipped.append((image.name, str(error)))
                continue
            except OSError as error:  # of the disk, not of the image: the next start may read it
                raise UnreadableSourceError(
                    f"{image.name} cannot be read ({error}). Let this user read it, or remove it, "
                    "and run the same command again; finished shards are kept."
                ) from error
            write({IMAGE_COLUMN: data, LABEL_COLUMN: image.label})
        return Filled(skipped=tuple(skipped))
