"""Whatever a header says: DALI and Pillow show the same picture, or both refuse it."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import make_decoder
from pipelines.encoded import MAX_SCANS
from pipelines.errors import UndecodableImageError
from tests.unit.pipelines import pictures

JPEG, PNG = pictures.jpeg(16, 24, quality=95), pictures.png(16, 24)
CONFIG = DecodeConfig(image_size=16, scales=1, decode_threads=1)
DALI, PILLOW = (make_decoder(name, CONFIG, device="cpu") for name in ("dali", "pillow"))
# Where row 0 of an upright picture comes from, by the orientation of the stored one.
TURNS = [
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.swapaxes(0, 1),
    lambda a: a[::-1].swapaxes(0, 1),
    lambda a: a[::-1, ::-1].swapaxes(0, 1),
    lambda a: a[:, ::-1].swapaxes(0, 1),
]


def shown(decoder, data: bytes) -> torch.Tensor | None:
    try:
        ((image,),) = decoder([data])
    except UndecodableImageError:
        return None
    return image


def agreed(data: bytes) -> torch.Tensor | None:
    """What both decoders show; None if both refuse the image."""
    one, other = shown(DALI, data), shown(PILLOW, data)
    assert (one is None) == (other is None)
    if one is not None:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    return one


def assert_turned(data: bytes, *, plain: bytes, orientation: int) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(plain)))
    wanted = shown(PILLOW, pictures.encode(np.ascontiguousarray(TURNS[orientation - 1](pixels))))
    image = agreed(data)
    assert image is not None
    torch.testing.assert_close(image, wanted, rtol=0, atol=1e-5)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def chunk(kind: bytes, content: bytes, *, wrong: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ wrong
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def tiff(orientation: int, *, order: str = ">", long: bool = False, before: int = 0) -> bytes:
    """EXIF data, with other tags before the orientation."""
    entries = [struct.pack(f"{order}HHIHH", 0x0100 + n, 3, 1, 7, 0) for n in range(before)]
    form, kind = ("I", 4) if long else ("H2x", 3)
    entries.append(struct.pack(f"{order}HHI{form}", 0x0112, kind, 1, orientation))
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + b"".join(entries) + bytes(4)


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
        'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


@st.composite
def exif(draw: st.DrawFn) -> tuple[bytes, int]:
    """EXIF data, and the orientation that it tells: 1 where it is damaged or out of range."""
    told = draw(st.sampled_from([*range(10), 256, 65535]))
    order = draw(st.sampled_from("<>"))
    data = tiff(told, order=order, long=draw(st.booleans()), before=draw(st.integers(0, 2)))
    means = told if told in range(1, 9) else 1
    damage = draw(st.sampled_from([None, None, None, "cut short", "other byte order", "no EXIF"]))
    if damage == "cut short":
        return data[:-14], 1
    if damage == "other byte order":
        return (b"MM" if order == "<" else b"II") + data[2:], 1
    return (b"noise", 1) if damage else (data, means)


def text_profile(data: bytes) -> bytes:
    """EXIF as ImageMagick once put it into the texts of a PNG."""
    content = b"Exif\0\0" + data
    return b"\nexif\n%8d\n%s\n" % (len(content), content.hex().encode())


APP1_XMP = b"http://ns.adobe.com/xap/1.0/\0"
Part = tuple[bytes, int | None]  # and the orientation, where it is at the place for it
orientations = st.integers(0, 9)
noise = st.binary(max_size=40)
jpeg_parts: st.SearchStrategy[Part] = st.one_of(
    exif().map(lambda told: (segment(0xE1, b"Exif\0\0" + told[0]), told[1])),
    exif().map(lambda told: (segment(0xE2, b"Exif\0\0" + told[0]), None)),
    exif().map(lambda told: (segment(0xE1, b"EXIF\0\0" + told[0]), None)),
    orientations.map(lambda value: (segment(0xE1, APP1_XMP + xmp(value)), None)),
    st.tuples(
        st.builds(segment, st.sampled_from([0xE0, *range(0xE2, 0xEE), 0xEF, 0xFE]), noise),
        st.none(),
    ),
    # Fill bytes, markers without content, bytes that belong to nothing.
    st.tuples(st.sampled_from([b"\xff", b"\xff\x01", b"\xff\xd3", b"\0junk"]), st.none()),
    # With JFIF, Adobe's word on the colours does not count.
    st.integers(0, 2).map(
        lambda value: (segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([value])), None)
    ),
)
png_parts: st.SearchStrategy[Part] = st.one_of(
    exif().map(lambda told: (chunk(b"eXIf", told[0]), told[1])),
    exif().map(lambda told: (chunk(b"eXIf", told[0], wrong=1), None)),
    exif().map(
        lambda told: (chunk(b"tEXt", b"Raw profile type exif\0" + text_profile(told[0])), None)
    ),
    orientations.map(
        lambda value: (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(value)), None)
    ),
    st.tuples(
        st.builds(
            chunk,
            st.sampled_from([b"tEXt", b"gAMA", b"iCCP", b"tRNS", b"sBIT", b"pHYs", b"abCd"]),
            noise,
            wrong=st.integers(0, 1),
        ),
        st.none(),
    ),
)


def boundaries(data: bytes) -> list[int]:
    """Where something may be put in: between the segments before the scan, or the chunks."""
    places = []
    if data.startswith(b"\xff\xd8"):
        place = 2
        while data[place + 1] != 0xDA:
            places.append(place)
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    else:
        place = 33
        while place < len(data):
            places.append(place)
            place += 12 + int.from_bytes(data[place : place + 4], "big")
    return [*places, place] if data.startswith(b"\xff\xd8") else places


@st.composite
def dressed(draw: st.DrawFn, plain: bytes, parts: st.SearchStrategy[Part]) -> Part:
    """A picture with metadata in several places, and its orientation."""
    places = boundaries(plain)
    put = draw(st.lists(st.tuples(st.sampled_from(places), parts), max_size=5))
    put.sort(key=lambda each: each[0])
    data, done = b"", 0
    for place, (content, _) in put:
        data, done = data + plain[done:place] + content, place
    told = [orientation for _, (_, orientation) in put if orientation is not None]
    return data + plain[done:], told[0] if told else 1


@given(case=dressed(JPEG, jpeg_parts))
@settings(max_examples=50, deadline=None)
def test_a_jpeg_is_turned_as_its_first_exif_segment_says(case: tuple[bytes, int]) -> None:
    data, orientation = case
    assert_turned(data, plain=JPEG, orientation=orientation)


@given(case=dressed(PNG, png_parts))
@settings(max_examples=50, deadline=None)
def test_a_png_is_turned_as_its_exif_chunk_says(case: tuple[bytes, int]) -> None:
    data, orientation = case
    assert_turned(data, plain=PNG, orientation=orientation)


KINDS = [
    JPEG,
    PNG,
    *(pictures.jpeg(16, 24, **options) for options in ({"progressive": True}, {"mode": "CMYK"})),
    *(pictures.png(16, 24, mode=mode) for mode in ("L", "P", "RGBA")),
]


@given(kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_header_is_read_alike(kind: bytes, data: st.DataObject) -> None:
    """One to three bytes of the header are others, or the file ends early."""
    *_, last = boundaries(kind)
    head = last + 1 + int.from_bytes(kind[last + 2 : last + 4], "big")
    head = head if kind.startswith(b"\xff\xd8") else 60
    damaged = bytearray(kind)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, head))] = data.draw(st.integers(0, 255))
    agreed(bytes(damaged))
    agreed(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


@given(kind=st.sampled_from([kind for kind in KINDS if kind.startswith(b"\x89PNG")]))
@settings(max_examples=6, deadline=None)
def test_a_png_is_whole_and_its_checksums_are_right(kind: bytes) -> None:
    assert agreed(kind) is not None
    assert agreed(kind[:-12]) is None
    for end in boundaries(kind)[1:]:
        damaged = bytearray(kind)
        damaged[end - 1] ^= 1
        assert agreed(bytes(damaged)) is None


def test_fill_bytes_are_passed_over_once() -> None:
    fill = b"\xff" * (1 << 24)
    assert agreed(JPEG[:2] + fill + JPEG[2:]) is not None
    assert agreed(b"\xff\xd8" + fill) is None


def scanned(times: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """A progressive JPEG with its last scan repeated, each time with bytes around it."""
    whole = pictures.jpeg(16, 24, progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + (before + whole[last:-2] + after) * times + whole[-2:]


RESTARTS = segment(0xDD, b"\0\1")
AROUND = {
    "nothing": {},
    "fill bytes": {"before": b"\xff\xff"},
    "bytes of no marker": {"before": b"\0\xff\0junk"},
    "comments": {"before": segment(0xFE, b"a \xff\xd9 that is no end")},
    "an empty segment": {"before": b"\xff\xfe\0\0"},
    "restarts": {"before": RESTARTS, "after": b"\xff\xd7"},
    "what looks like a long segment": {"before": RESTARTS, "after": b"\xff\x02\xff\xff"},
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_jpeg_has_few_scans(around: dict[str, bytes]) -> None:
    for decoder in (DALI, PILLOW):
        with pytest.raises(UndecodableImageError, match=f"more than {MAX_SCANS} scans"):
            decoder([scanned(MAX_SCANS, **around)])


def test_scans_are_those_that_decoders_meet() -> None:
    first = len(pictures.jpeg(16, 24, progressive=True).split(b"\xff\xda")) - 1
    assert agreed(scanned(MAX_SCANS - first)) is not None
    assert agreed(scanned(MAX_SCANS - first + 1)) is None
    likeness = b"\xff\xda\0\2" * 4 * MAX_SCANS
    elsewhere = [scanned(1) + likeness, JPEG + likeness]
    elsewhere.append(scanned(1, before=segment(0xFE, likeness)))
    for whole in elsewhere:
        assert agreed(whole) is not None
