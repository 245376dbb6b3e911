"""Encoded images of every kind that turns up in datasets, and some that should not."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def photo(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours with some grain, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-20, 21, (height, width, 3))
    return np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)


def encode(image: Image.Image | NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def png(height: int = 16, width: int = 16, *, mode: str = "RGB", seed: int = 0) -> bytes:
    return encode(Image.fromarray(photo(height, width, seed=seed)).convert(mode))


def jpeg(
    height: int = 16, width: int = 16, *, mode: str = "RGB", seed: int = 0, **options: object
) -> bytes:
    return encode(Image.fromarray(photo(height, width, seed=seed)).convert(mode), "JPEG", **options)


def raw_png(
    width: int,
    height: int,
    *,
    depth: int,
    colour: int,
    rows: bytes = b"",
    compressed: bytes | None = None,
) -> bytes:
    """A PNG put together by hand, for what Pillow does not write."""
    compressed = zlib.compress(rows) if compressed is None else compressed

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_without_checksum() -> bytes:
    """A PNG whose pixels are all there, and whose compressed data lacks the checksum at its end."""
    rows = b"".join(b"\0" + row.tobytes() for row in photo(16, 16))
    return raw_png(16, 16, depth=8, colour=2, compressed=zlib.compress(rows)[:-4])


def deep_png(height: int = 16, width: int = 16, *, channels: int = 3) -> tuple[bytes, NDArray]:
    """A 16 bit PNG, and its high bytes."""
    values = np.random.default_rng(1).integers(0, 65536, (height, width, channels))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = {1: 0, 3: 2}[channels]
    data = raw_png(width, height, depth=16, colour=colour, rows=rows)
    return data, (values >> 8).astype(np.uint8)


def bomb() -> bytes:
    """A few bytes that claim to be 30000 x 30000 pixels."""
    return raw_png(30_000, 30_000, depth=8, colour=2, rows=b"\0")


def with_orientation(data_height: int, data_width: int) -> bytes:
    """A JPEG whose tag asks for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(data_height, data_width, exif=exif.tobytes())


GOOD = {
    "grey PNG": png(mode="L"),
    "RGB PNG": png(),
    "palette PNG": png(mode="P"),
    "two-colour PNG": png(mode="1"),
    "grey PNG with alpha": png(mode="LA"),
    "RGB PNG with alpha": png(mode="RGBA"),
    "16 bit grey PNG": deep_png(channels=1)[0],
    "16 bit RGB PNG": deep_png(channels=3)[0],
    "PNG with a transparent colour": encode(Image.fromarray(photo(16, 16)), transparency=(1, 2, 3)),
    "grey JPEG": jpeg(mode="L"),
    "RGB JPEG": jpeg(),
    "JPEG without chroma subsampling": jpeg(subsampling=0),
    "progressive JPEG": jpeg(progressive=True),
    "CMYK JPEG": jpeg(mode="CMYK"),
    "JPEG with an orientation": with_orientation(16, 16),
    "1 x 1": png(1, 1),
    "wide": png(20, 48),
    "tall": jpeg(64, 33),
    "odd": png(17, 17),
    "large": jpeg(130, 170),
}

_WHOLE_JPEG, _WHOLE_PNG = jpeg(40, 40), png(40, 40)
BAD = {
    "nothing": b"",
    "half a JPEG": _WHOLE_JPEG[: len(_WHOLE_JPEG) // 2],
    "half a PNG": _WHOLE_PNG[: len(_WHOLE_PNG) // 2],
    "a JPEG's first bytes": _WHOLE_JPEG[:20],
    "a PNG's first bytes": _WHOLE_PNG[:30],
    "a web page": b"<html><body>404 Not Found</body></html>",
    "zeros": bytes(1000),
    "a GIF": encode(Image.fromarray(photo(16, 16)), "GIF"),
    "a TIFF": encode(Image.fromarray(photo(16, 16)), "TIFF"),
    "a bomb": bomb(),
    "half a CMYK JPEG": jpeg(40, 40, mode="CMYK")[:900],
}
