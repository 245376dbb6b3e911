"""DALI, the Pillow reference and the models' pyramid are one contract."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from models.pyramid import merge, split
from pipelines.augment import AugmentConfig, SampleKey
from pipelines.decode.contract import DecodeConfig, Decoder
from pipelines.decode.dali import DaliDecoder
from pipelines.decode.make import make_decoder
from pipelines.errors import DataError, UndecodableImageError, UnsplittableImageError
from tests.unit.pipelines import pictures

DECODERS = ("dali", "pillow")

# Both resize in float32, and round the filter's weights each in its own way: 1/800 grey level.
RESIZED = 1e-5


class Chosen:
    """Random numbers of a sample's crop that are not random."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = numbers

    def uniforms(self, count: int) -> np.ndarray:
        assert count == len(self._numbers)
        return np.array(self._numbers)


def config(size: int = 16, *, channels: int = 3, scales: int = 2) -> DecodeConfig:
    return DecodeConfig(image_size=size, channels=channels, scales=scales, decode_threads=1)


def decoder(name: str, size: int = 16, *, channels: int = 3, scales: int = 2) -> Decoder:
    return make_decoder(name, config(size, channels=channels, scales=scales), device="cpu")


def assert_near(
    bands: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], *, within: float = 1e-6
) -> None:
    assert len(bands) == len(expected)
    for band, other in zip(bands, expected, strict=True):
        assert band.dtype == other.dtype == torch.float32
        torch.testing.assert_close(band, other, rtol=0, atol=within)


@pytest.mark.parametrize("channels", [1, 3])
def test_decoders_agree_on_every_kind(channels: int) -> None:
    dali, pillow = (decoder(name, channels=channels) for name in DECODERS)
    for kind, data in pictures.GOOD.items():
        bands, expected = dali([data]), pillow([data])
        assert bands[-1].shape == (1, channels, 16, 16), kind
        exact = Image.open(io.BytesIO(data)).size == (16, 16)
        assert_near(bands, expected, within=1e-6 if exact else RESIZED)


@pytest.mark.parametrize("size", [2, 8, 32, 48, 128])
def test_decoders_agree_on_every_size(size: int) -> None:
    data = list(pictures.GOOD.values())
    assert_near(decoder("dali", size)(data), decoder("pillow", size)(data), within=RESIZED)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("scales", "size", "channels"), [(1, 7, 3), (2, 8, 1), (3, 64, 3)])
def test_bands_are_those_of_the_models(name: str, scales: int, size: int, channels: int) -> None:
    images = [pictures.png(size, size, seed=seed) for seed in range(3)]
    bands = decoder(name, size, channels=channels, scales=scales)(images)
    mode = "L" if channels == 1 else "RGB"
    plain = [np.asarray(Image.open(io.BytesIO(data)).convert(mode)) for data in images]
    pixels = torch.from_numpy(np.stack(plain)).reshape(3, size, size, channels)
    whole = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert [band.shape[-1] for band in bands] == [
        size >> scale for scale in reversed(range(scales))
    ]
    assert_near(bands, split(whole, scales))
    torch.testing.assert_close(merge(bands), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize(("size", "source"), [(4, 4), (16, 16), (64, 64), (32, 70), (128, 128)])
def test_the_split_of_a_decoded_image_is_the_models(
    name: str, scales: int, size: int, source: int
) -> None:
    images = [pictures.png(source, source, seed=seed) for seed in range(3)]
    images += [pictures.jpeg(source, source, seed=seed) for seed in range(3)]
    (whole,) = decoder(name, size, scales=1)(images)
    bands = decoder(name, size, scales=scales)(images)
    for band, other in zip(bands, split(whole, scales), strict=True):
        assert torch.equal(band, other)


def test_values_fill_the_range() -> None:
    black, white = (pictures.encode(np.full((4, 4), value, np.uint8)) for value in (0, 255))
    (image,) = decoder("dali", 4, channels=1, scales=1)([black, white])
    assert image[0].eq(-1).all()
    assert image[1].eq(1).all()


@pytest.mark.parametrize("name", DECODERS)
def test_deep_images_keep_their_high_bytes(name: str) -> None:
    for channels in (1, 3):
        data, high = pictures.deep_png(channels=channels)
        (image,) = decoder(name, channels=channels, scales=1)([data])
        expected = torch.from_numpy(high).permute(2, 0, 1).float() / 127.5 - 1
        assert_near((image[0],), (expected,))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_images_are_turned_upright(name: str, kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    data = pictures.encode(pictures.photo(16, 20), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((20, 16) if tag < 5 else (16, 20))
    pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1).float() / 127.5 - 1
    expected = pixels[:, :, 2:18] if tag < 5 else pixels[:, 2:18]
    (image,) = decoder(name, 16, scales=1)([data])
    assert_near((image[0],), (expected,))


@pytest.mark.parametrize("crop", ["center", "random_resized"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [16, 48])
def test_decoders_agree_on_every_view(crop: str, flip: bool, size: int) -> None:
    augment = AugmentConfig(flip=flip, crop=crop, min_area=0.2, max_aspect=2.0)
    chosen = DecodeConfig(image_size=size, scales=2, decode_threads=1, augment=augment)
    data = list(pictures.GOOD.values())
    keys = [SampleKey(0, 0, number) for number in range(len(data))]
    dali, pillow = (make_decoder(name, chosen, device="cpu") for name in DECODERS)
    assert_near(dali(data, keys), pillow(data, keys), within=RESIZED)
    still = dali(data, None)
    assert_near(still, decoder("pillow", size)(data), within=RESIZED)
    changed = [not torch.equal(a, b) for a, b in zip(still[-1], dali(data, keys)[-1], strict=1)]
    assert any(changed) == (flip or crop != "center")


@pytest.mark.parametrize("name", DECODERS)
def test_a_view_shows_its_part_and_its_mirror_image(name: str) -> None:
    picture = pictures.photo(20, 30)
    chosen = DecodeConfig(
        image_size=20,
        scales=1,
        decode_threads=1,
        augment=AugmentConfig(flip=True, crop="random_resized", min_area=2 / 3, max_aspect=1.0),
    )
    # The smallest area is a square as high as the image; it lies as far to the right as it can.
    keys = [Chosen(0.9, 0.0, 0.5, 0.999, 0.5), Chosen(0.1, 0.0, 0.5, 0.999, 0.5)]
    (images,) = make_decoder(name, chosen, device="cpu")([pictures.encode(picture)] * 2, keys)
    expected = torch.from_numpy(picture[:, 10:].copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert_near((images[0], images[1]), (expected, expected.flip(-1)))


def test_neighbours_in_the_batch_change_nothing() -> None:
    """So a run on another number of ranks sees the same bits."""
    dali = decoder("dali")
    exact, others = pictures.jpeg(), [pictures.png(20, 30), pictures.GOOD["CMYK JPEG"]]
    alone = dali([exact])
    together = dali([*others, exact])
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one[0], many[2])


def test_bands_are_the_callers_to_keep() -> None:
    dali = decoder("dali")
    first = dali([pictures.png(seed=1)])
    kept = [band.clone() for band in first]
    dali([pictures.png(seed=2)])
    for band, copy in zip(first, kept, strict=True):
        assert torch.equal(band, copy)
        band.zero_()


def test_batches_may_grow_and_shrink() -> None:
    dali, pillow = (decoder(name) for name in DECODERS)
    images = [pictures.png(seed=seed) for seed in range(5)]
    for count in (2, 5, 1, 4):
        assert_near(dali(images[:count]), pillow(images[:count]))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", pictures.BAD)
def test_bad_images_are_named(name: str, kind: str) -> None:
    decode = decoder(name)
    good = [pictures.png(seed=seed) for seed in range(3)]
    with pytest.raises(UndecodableImageError, match=r"\[1\] of the batch cannot be") as raised:
        decode([good[0], pictures.BAD[kind], *good[1:]])
    assert raised.value.indices == (1,)
    assert_near(decode(good), decoder("pillow")(good))


def test_all_bad_images_of_a_batch_are_named() -> None:
    cut = pictures.jpeg(40, 40)[:700]
    for name in DECODERS:
        with pytest.raises(UndecodableImageError) as raised:
            decoder(name)([cut, pictures.png(), cut, pictures.jpeg(), cut])
        assert raised.value.indices == (0, 2, 4)


class Failing:
    """A pipeline that is out of memory a number of times."""

    def __init__(self, times: int, real: Any) -> None:
        self.times = times
        self.real = real

    def run(self, **inputs: object) -> object:
        self.times -= 1
        if self.times >= 0:
            raise RuntimeError("out of memory")
        return self.real.run(**inputs)


@pytest.mark.parametrize("times", [1, 1000])
def test_failures_that_are_not_the_images_pass_through(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    dali = DaliDecoder(config(), device="cpu")
    images = [pictures.png(seed=1), pictures.png(seed=2)]
    dali(images)
    failing = Failing(times, dali._pipelines.get(lambda: [], kind=False, batch=2))
    monkeypatch.setattr(dali._pipelines, "get", lambda *_, **__: failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        dali(images)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UnsplittableImageError, match=r"28 x 28 .* 4 scales.* multiple of 8.*24"):
        config(28, scales=4)
    for wrong in ({"channels": 4}, {"scales": 0}, {"decode_threads": 0}):
        with pytest.raises(DataError):
            DecodeConfig(**({"image_size": 8} | wrong))
    with pytest.raises(DataError, match="no decoder 'opencv'"):
        make_decoder("opencv", config(), device="cpu")
    with pytest.raises(DataError, match="'meta'"):
        DaliDecoder(config(), device="meta")
