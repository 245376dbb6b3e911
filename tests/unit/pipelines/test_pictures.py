"""Every kind of picture becomes the tensor that its author meant, worked out by hand.

Nothing here asks another decoder what is right: pixels are known because they were put there.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import make_decoder
from tests.unit.pipelines import pictures

DECODERS = ("dali", "pillow")
SIZE = 16
# Half a level of rounding for each of three values that are combined, in lossy files.
LOSSY = 2.0


def decoded(name: str, data: bytes, *, size: int = SIZE, channels: int = 3) -> NDArray[np.float64]:
    """One image in grey levels, [height, width, channels]."""
    config = DecodeConfig(image_size=size, channels=channels, scales=1, decode_threads=1)  # type: ignore[arg-type]
    (images,) = make_decoder(name, config, device="cpu")([data])  # type: ignore[arg-type]
    assert images.dtype == torch.float32
    assert images.shape == (1, channels, size, size)
    return (images[0].permute(1, 2, 0).double().numpy() + 1) * 127.5


def assert_shows(image: NDArray[np.float64], wanted: NDArray[np.integer], *, within: float) -> None:
    wanted = np.broadcast_to(wanted, image.shape)
    np.testing.assert_allclose(image, wanted, rtol=0, atol=within)


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(mode: str, colour: tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (SIZE, SIZE), colour if len(colour) > 1 else colour[0])


EXACT = 1e-4  # float32 about a value of 127.5, in grey levels


@pytest.mark.parametrize("name", DECODERS)
def test_plain_pixels(name: str) -> None:
    rgb, grey = noise(SIZE, SIZE, 3), noise(SIZE, SIZE)
    assert_shows(decoded(name, pictures.encode(rgb)), rgb, within=EXACT)
    grey_file = pictures.encode(grey)
    assert_shows(decoded(name, grey_file), grey[..., None], within=EXACT)
    assert_shows(decoded(name, grey_file, channels=1), grey[..., None], within=EXACT)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_alpha_is_dropped_and_colours_stay(name: str, alpha: int) -> None:
    rgb = noise(SIZE, SIZE, 3)
    cover = np.full((SIZE, SIZE, 1), alpha, np.uint8)
    assert_shows(
        decoded(name, pictures.encode(np.concatenate([rgb, cover], -1))), rgb, within=EXACT
    )
    grey = np.concatenate([rgb[..., :1], cover], -1)
    data = pictures.encode(Image.fromarray(grey, "LA"))
    assert_shows(decoded(name, data), rgb[..., :1], within=EXACT)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_looked_up(name: str, transparent: bool) -> None:
    colours, places = noise(256, 3, seed=1), noise(SIZE, SIZE, seed=2)
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    options = {"transparency": int(places[0, 0])} if transparent else {}
    assert_shows(decoded(name, pictures.encode(image, **options)), colours[places], within=EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_two_colours_are_black_and_white(name: str) -> None:
    bits = noise(SIZE, SIZE) > 127
    data = pictures.encode(Image.fromarray(bits))
    assert_shows(decoded(name, data), 255 * bits[..., None].astype(np.uint8), within=EXACT)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_high_byte_counts(name: str, channels: int) -> None:
    data, high = pictures.deep_png(channels=channels)
    assert_shows(decoded(name, data), high, within=EXACT)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (40, 90, 200, 30), (0, 0, 0, 255)])
def test_inks_darken_white_paper(name: str, ink: tuple[int, ...]) -> None:
    """CMYK: each ink takes its share of the light, black of all of it."""
    data = pictures.encode(flat("CMYK", ink), "JPEG", quality=100)
    *coloured, black = (np.array(ink) / 255).tolist()
    wanted = np.array([255 * (1 - share) * (1 - black) for share in coloured])
    assert_shows(decoded(name, data), wanted, within=LOSSY)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_colours(name: str, progressive: bool) -> None:
    for colour in ((255, 0, 0), (0, 255, 0), (12, 34, 156), (255, 255, 255)):
        data = pictures.encode(flat("RGB", colour), "JPEG", quality=100, progressive=progressive)
        assert_shows(decoded(name, data), np.array(colour), within=LOSSY)
    data = pictures.encode(flat("L", (77,)), "JPEG", quality=100)
    assert_shows(decoded(name, data), np.array([77]), within=EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_colours_become_grey_by_how_bright_they_look(name: str) -> None:
    """ITU-R BT.601: 0.299 red, 0.587 green, 0.114 blue."""
    rgb = noise(SIZE, SIZE, 3)
    for data in (pictures.encode(rgb), pictures.encode(Image.fromarray(rgb).convert("RGBA"))):
        wanted = rgb @ np.array([0.299, 0.587, 0.114])
        assert_shows(decoded(name, data, channels=1), wanted[..., None], within=1.0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("tag", range(1, 9))
def test_the_camera_was_held_askew(name: str, tag: int) -> None:
    """EXIF 2.3, 4.6.4: the tag names the sides where the first row and the first column belong."""
    exif = Image.Exif()
    exif[0x0112] = tag
    upright = noise(SIZE, SIZE, 3)
    png = pictures.encode(askew(upright, tag), exif=exif)
    assert_shows(decoded(name, png), upright, within=EXACT)
    # Blocks of one grey level survive the compression.
    blocks = np.kron(noise(2, 2, 1, seed=tag), np.ones((8, 8, 3), np.uint8))
    jpeg = pictures.encode(askew(blocks, tag), "JPEG", quality=100, exif=exif)
    assert_shows(decoded(name, jpeg), blocks, within=LOSSY)


def askew(upright: NDArray[np.uint8], tag: int) -> NDArray[np.uint8]:
    """What the camera stored."""
    row, column = SIDES[tag - 1].split()
    stored = upright if row in ("top", "bottom") else upright.transpose(1, 0, 2)
    if row in ("bottom", "right"):
        stored = stored[::-1]
    if column in ("bottom", "right"):
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored)


SIDES = ["top left", "top right", "bottom right", "bottom left"]
SIDES += ["left top", "right top", "right bottom", "left bottom"]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_pixel_fills_the_image(name: str, kind: str) -> None:
    data = pictures.encode(np.array([[[10, 200, 90]]], np.uint8), kind, **QUALITY[kind])
    within = {"PNG": EXACT, "JPEG": LOSSY}[kind]
    assert_shows(decoded(name, data), np.array([10, 200, 90]), within=within)


QUALITY: dict[str, dict[str, object]] = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_twenty_megapixels(name: str) -> None:
    """Red rises from left to right, green from top to bottom: a mean is the value in the middle."""
    width, height, size = 5000, 4000, 64
    assert width * height == 20_000_000
    across = np.linspace(0, 255, width)
    down = np.linspace(0, 255, height)
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.rint(across), np.rint(down)[:, None], 128
    data = pictures.encode(image, "JPEG", quality=95, subsampling=0)
    shown = decoded(name, data, size=size)
    cells = (np.arange(size) + 0.5) / size
    # The central square; pixel n lies at n + 0.5, and the ramp at n.
    wanted = np.empty((size, size, 3))
    wanted[..., 0] = np.interp(500 + cells * 4000 - 0.5, np.arange(width), across)
    wanted[..., 1] = np.interp(cells * 4000 - 0.5, np.arange(height), down)[:, None]
    wanted[..., 2] = 128
    inner = slice(1, -1)  # at the rim the filter sees the last pixel repeated
    assert_shows(shown[inner, inner], wanted[inner, inner], within=1.0)
