"""Encoded images: the one reading of their headers, and the plain pixels they stand for.

Decoders differ in where they look for an orientation, in what they forgive, and in what they make
of metadata. So each of them is given a file that is put together here: the parts that decide the
pixels, in their order, and where the image is to be turned the one tag that says so.

This is also where hostile images stop: only JPEG and PNG are read, and an image that would need
more memory than any photograph is refused by the size in its header, before anything is decoded, as
is a JPEG whose scans would be decoded without end.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.errors import BadSampleError

MAX_PIXELS = 89_478_485  # 256 MiB of RGB; from here on Pillow itself warns of a bomb

_ORIENTATION = 0x0112  # EXIF tag
_TURNED = range(5, 9)  # its values that exchange width and height
_SHORT, _LONG = 3, 4  # types of EXIF values

# Encoders write about ten. A few bytes of a further one have each coefficient looked at once more.
MAX_SCANS = 100

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
# libjpeg skips what lies before a marker, and fill bytes, of which the last will do: a pattern that
# takes all of them looks at each as often as there are some before it.
_MARKER = re.compile(rb"\xff([^\x00\xff])")
# What ends a scan. Before, libjpeg passes over lone markers of which no image has any, without what
# would be their content.
_MARKER_OF_SCANS = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without content
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_USUAL_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; Huffman codes
_YCBCR_NAMES = (b"\x01\x02\x03", b"\x00\x01\x02")

_PNG = b"\x89PNG\r\n\x1a\n"
_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_GREY, _RGB, _PALETTE = 0, 2, 3  # a PNG's colour types


class BadImageError(BadSampleError):
    """These bytes are not a whole JPEG or PNG image of sane size."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image, and what its header says.

    Attributes:
        data: The file without metadata. A JPEG that is to be turned has an EXIF tag of its own.
        format: How it is encoded.
        width: Columns as they are stored.
        height: Rows as they are stored.
        orientation: How it must be turned, as EXIF numbers it: 1 is upright, 2 to 8 are not.
        colours: "grey" or "rgb" of 8 bit, whose pixels all decoders agree on. The "other" kinds
            (alpha, palettes, CMYK, 16 bit, …) are matters of convention; `pixels` settles them.
    """

    data: bytes
    format: Literal["JPEG", "PNG"]
    width: int
    height: int
    orientation: int
    colours: Literal["grey", "rgb", "other"]

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height when it is turned upright."""
        width, height = self.width, self.height
        return (height, width) if self.orientation in _TURNED else (width, height)

    def is_plain(self, *, channels: int) -> bool:
        """Tell whether all decoders make the same pixels of it.

        RGB that is to become grey is a matter of convention too, and DALI turns no PNG upright.
        """
        if self.format == "PNG" and self.orientation != 1:
            return False
        return self.colours == "grey" or (self.colours == "rgb" and channels == 3)


def read_image(data: bytes) -> EncodedImage:
    """Read an image's header.

    EXIF alone tells an orientation, where the formats' standards put it: in the first APP1 segment
    of that name in a JPEG, in the chunk eXIf of a PNG. XMP and texts do not.

    Raises:
        BadImageError: It is not JPEG or PNG, it is cut short, a PNG's checksum is wrong, it is
            too large, or a JPEG has too many scans.
    """
    if data.startswith(b"\xff\xd8"):
        image = _read_jpeg(data)
    elif data.startswith(_PNG):
        image = _read_png(data)
    else:
        raise BadImageError("these bytes are no JPEG or PNG" if data else "the file is empty")
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    if not image.width * image.height:
        raise BadImageError("its header tells no size")
    return image


def _read_jpeg(data: bytes) -> EncodedImage:
    kept: list[bytes] = []
    frames: list[tuple[int, bytes]] = []
    transforms: set[int] = set()
    exif: bytes | None = None
    place = 2
    while match := _MARKER.search(data, place):
        marker, begin = match[1][0], match.end()
        place = begin
        if marker in _BARE:
            continue
        place += int.from_bytes(data[begin : begin + 2], "big")
        if marker in (_SOI, _EOI) or not begin + 2 <= place <= len(data):
            break
        content = data[begin + 2 : place]
        if marker == _SOS:
            if data.find(b"\xff\xd9", place) < 0:
                raise BadImageError("it is cut short: there is no end marker")
            if _has_too_many_scans(data, place):
                raise BadImageError(f"it has more than {MAX_SCANS} scans")
            kept.append(b"\xff" + data[begin - 1 :])
            return _jpeg(kept, frames, transforms, _orientation(exif or b""))
        if marker == _APP1 and content.startswith(b"Exif\0") and exif is None:
            exif = content[6:]
        if marker in _FRAMES:
            frames.append((marker, content))
        if marker == _APP14 and content.startswith(b"Adobe"):
            transforms.add(content[11] if len(content) > 11 else -1)
        elif marker == _COM or (
            _APP0 <= marker <= _APP15 and not (marker == _APP0 and content.startswith(b"JFIF\0"))
        ):
            continue
        kept.append(b"\xff" + data[begin - 1 : place])
    raise BadImageError("it is cut short in its header")


def _has_too_many_scans(data: bytes, place: int) -> bool:
    """Tell whether a decoder would meet too many scans in a JPEG.

    Args:
        data: The file.
        place: Where the content of its first scan begins.
    """
    scans = 1
    # Most files are told by this alone: so often the two bytes stand nowhere, also by chance.
    if data.count(bytes([0xFF, _SOS]), place) < MAX_SCANS:
        return False
    while scans <= MAX_SCANS and (match := _MARKER_OF_SCANS.search(data, place)):
        if match[1][0] == _EOI:
            return False
        scans += match[1][0] == _SOS
        # The length counts its own two bytes, whatever it says.
        place = match.end() + max(2, int.from_bytes(data[match.end() : match.end() + 2], "big"))
    return scans > MAX_SCANS


def _jpeg(
    kept: list[bytes], frames: list[tuple[int, bytes]], transforms: set[int], orientation: int
) -> EncodedImage:
    """Put a JPEG together.

    Args:
        kept: Its segments, without metadata; the last one goes on to the end of the file.
        frames: Marker and content of each frame header.
        transforms: What Adobe's segments say of its colours; 1 is YCbCr.
        orientation: How it must be turned.
    """
    if len(frames) != 1 or len(frames[0][1]) < 6:
        raise BadImageError("there is no frame header, or more than one")
    ((marker, frame),) = frames
    depth, height, width, components = struct.unpack_from(">BHHB", frame)
    colours: Literal["grey", "rgb", "other"] = "other"
    if depth == 8 and marker in _USUAL_FRAMES:
        if components == 1:
            colours = "grey"
        elif frame[6::3] in _YCBCR_NAMES and transforms <= {1}:
            colours = "rgb"
    return EncodedImage(
        data=b"".join([b"\xff\xd8", _exif_segment(orientation), *kept]),
        format="JPEG",
        width=width,
        height=height,
        orientation=orientation,
        colours=colours,
    )


def _exif_segment(orientation: int) -> bytes:
    """An APP1 segment that tells nothing else; none for an upright image."""
    if orientation == 1:
        return b""
    tiff = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, _ORIENTATION, _SHORT, 1, orientation, 0, 0)
    content = b"Exif\0\0" + tiff
    return struct.pack(">BBH", 0xFF, _APP1, 2 + len(content)) + content


def _orientation(tiff: bytes) -> int:
    """Find the orientation in EXIF data; 1 where it tells none that there is."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, first)
        for place in range(first + 2, first + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
            if tag == _ORIENTATION and kind in (_SHORT, _LONG):
                form = "H" if kind == _SHORT else "I"
                (value,) = struct.unpack_from(f"{order}{form}", tiff, place + 8)
                return value if value in range(1, 9) else 1
    except struct.error:  # it is cut short, or points outside
        pass
    return 1


def _read_png(data: bytes) -> EncodedImage:
    chunks: dict[bytes, list[bytes]] = {kind: [] for kind in _CRITICAL}
    exif = b""
    place, view = len(_PNG), memoryview(data)
    while not chunks[b"IEND"]:
        begin, kind = place, data[place + 4 : place + 8]
        place += 12 + int.from_bytes(data[begin : begin + 4], "big")
        if place > len(data):
            raise BadImageError("it is cut short: there is no end chunk")
        optional = bool(kind[0] & 0x20)
        if optional and (kind != b"eXIf" or exif):
            continue
        (checksum,) = struct.unpack_from(">I", data, place - 4)
        sound = zlib.crc32(view[begin + 4 : place - 4]) == checksum
        if optional:
            exif = data[begin + 8 : place - 4] if sound else exif
            continue
        if kind not in chunks:
            raise BadImageError(f"its chunk {kind!r} is of no known kind")
        if not sound:
            raise BadImageError(f"the checksum of its chunk {kind.decode()} is wrong")
        chunks[kind].append(data[begin:place])
    if len(chunks[b"IHDR"]) != 1 or len(chunks[b"IHDR"][0]) != 25 or not chunks[b"IDAT"]:
        raise BadImageError("it has no header or no pixels")
    (header,) = chunks[b"IHDR"]
    width, height, depth, colour, *variants = struct.unpack_from(">IIBBBBB", header, 8)
    colours: Literal["grey", "rgb", "other"] = "other"
    if depth == 8 and variants == [0, 0, 0] and colour in (_GREY, _RGB):
        colours = "grey" if colour == _GREY else "rgb"
    palette = chunks[b"PLTE"] if colour == _PALETTE else []
    return EncodedImage(
        data=b"".join([_PNG, header, *palette, *chunks[b"IDAT"], *chunks[b"IEND"]]),
        format="PNG",
        width=width,
        height=height,
        orientation=_orientation(exif.removeprefix(b"Exif\0\0")),
        colours=colours,
    )


_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(image: EncodedImage) -> Image.Image:
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
    picture = open_image(image)
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
