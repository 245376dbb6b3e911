"""DALI on a GPU: the same views and bands as the reference, and memory that nobody overwrites."""

import numpy as np
import pytest
import torch

from models.pyramid import merge, split
from pipelines.augment import AugmentConfig, SampleKey
from pipelines.decode.contract import DecodeConfig, LatentDecodeConfig
from pipelines.decode.cpu import LatentDecoder, PillowDecoder
from pipelines.decode.dali import DaliDecoder, DaliLatentDecoder
from pipelines.errors import UndecodableImageError
from pipelines.latent_format import LatentFormat
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Cursor, Loader
from tests.support.synthetic import SyntheticImages
from tests.unit.pipelines import pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = "cuda:0"
# What a processor decodes, to a hundredth of a grey level on average (ADR 15).
SAME = 0.01 * 2 / 255
EXACT_KINDS = [data for kind, data in pictures.GOOD.items() if "PNG" in kind]


def config(size: int = 16, **changes: object) -> DecodeConfig:
    return DecodeConfig(image_size=size, scales=2, decode_threads=2, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("crop", ["center", "random_resized"])
def test_views_and_bands_are_those_of_the_reference(channels: int, size: int, crop: str) -> None:
    augment = AugmentConfig(flip=True, crop=crop, min_area=0.3, max_aspect=1.5)  # type: ignore[arg-type]
    chosen = config(size, channels=channels, augment=augment)
    gpu, reference = DaliDecoder(chosen, device=GPU), PillowDecoder(chosen, device=GPU)
    keys = [SampleKey(0, 1, number) for number in range(len(EXACT_KINDS))]
    for given in (None, keys):
        for band, other in zip(gpu(EXACT_KINDS, given), reference(EXACT_KINDS, given), strict=True):
            assert band.is_cuda
            torch.testing.assert_close(band, other, rtol=0, atol=2e-5)


def test_jpegs_are_decoded_as_by_a_processor() -> None:
    """Also those whose chroma has half the resolution."""
    jpegs = [data for kind, data in pictures.GOOD.items() if "JPEG" in kind]
    for subsampling in (0, 2):
        jpegs += [pictures.jpeg(40 + 8 * n, 60, seed=n, subsampling=subsampling) for n in range(8)]
    gpu, reference = DaliDecoder(config(32), device=GPU), PillowDecoder(config(32), device=GPU)
    error = (merge(gpu(jpegs)) - merge(reference(jpegs))).abs()
    assert error.mean() < SAME


def test_a_jpeg_does_not_depend_on_its_neighbours() -> None:
    """Not on which of a GPU's decoders is free, either."""
    jpegs = [pictures.jpeg(200 + 8 * n, 300 - 4 * n, seed=n, quality=90) for n in range(32)]
    gpu = DaliDecoder(config(128), device=GPU)
    whole = gpu(jpegs)
    for order in (list(reversed(range(32))), list(range(7, 15)), [20]):
        for band, other in zip(gpu([jpegs[n] for n in order]), whole, strict=True):
            assert torch.equal(band, other[order])


def test_large_photographs_come_out_right() -> None:
    photo = pictures.photo(4000, 5000)
    data = pictures.encode(photo, "JPEG", quality=95)
    gpu, reference = DaliDecoder(config(256), device=GPU), PillowDecoder(config(256), device=GPU)
    error = (merge(gpu([data])) - merge(reference([data]))).abs()
    assert error.mean() < SAME


@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize(("size", "source"), [(64, 64), (32, 70)])
def test_the_split_of_a_decoded_image_is_the_models(scales: int, size: int, source: int) -> None:
    images = [pictures.png(source, source, seed=seed) for seed in range(4)]

    def decode(scales: int) -> tuple[torch.Tensor, ...]:
        chosen = DecodeConfig(image_size=size, scales=scales, decode_threads=2)
        return DaliDecoder(chosen, device=GPU)(images)

    (whole,) = decode(1)
    for band, other in zip(decode(scales), split(whole, scales), strict=True):
        assert torch.equal(band, other)


def test_neighbours_in_the_batch_change_nothing() -> None:
    gpu = DaliDecoder(config(64), device=GPU)
    image, others = pictures.jpeg(90, 70), [pictures.png(80, 66), pictures.jpeg(64, 100, seed=3)]
    alone, together = gpu([image]), gpu([*others, image])
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one[0], many[2])


def test_bad_images_are_named() -> None:
    gpu = DaliDecoder(config(), device=GPU)
    good = [pictures.jpeg(seed=seed) for seed in range(3)]
    for kind in ("half a JPEG", "half a PNG", "a web page", "a bomb"):
        with pytest.raises(UndecodableImageError) as raised:
            gpu([good[0], pictures.BAD[kind], *good[1:]])
        assert raised.value.indices == (1,), kind
        assert gpu(good)[0].shape[0] == 3


def test_bands_stay_as_they_are_while_the_training_stream_is_busy() -> None:
    """The decoder runs ahead; what the step has not read yet must not be overwritten."""
    decode = DecodeConfig(image_size=64, scales=1, decode_threads=2)
    decoder = DaliDecoder(decode, device=GPU)
    busy = torch.randn(4096, 4096, device=GPU)
    batches = [[pictures.png(64, 64, seed=10 * b + i) for i in range(4)] for b in range(6)]
    expected = [PillowDecoder(decode, device="cpu")(batch)[0] for batch in batches]
    sums = []
    for batch in batches * 3:
        (images,) = decoder(batch)
        for _ in range(8):
            busy = (busy @ busy).clamp(-1, 1)  # queued ahead of the read
        sums.append(images.double().sum(dim=(1, 2, 3)) + 0 * busy[0, 0].double())
        del images
    for got, images in zip(sums, expected * 3, strict=True):
        torch.testing.assert_close(got.cpu(), images.double().sum(dim=(1, 2, 3)), rtol=0, atol=1e-2)


def test_latents_are_those_of_the_reference() -> None:
    stored = LatentFormat(dtype="float16", views=2, channels=4, size=32)
    rng = np.random.default_rng(0)
    samples = [np.abs(rng.normal(size=stored.shape)).astype(np.float16).tobytes() for _ in range(8)]
    decode = LatentDecodeConfig(format=stored, scales=2, scale=0.18215, shift=0.1, flip=True)
    keys = [SampleKey(1, 0, number) for number in range(8)]
    gpu, reference = (kind(decode, device=GPU) for kind in (DaliLatentDecoder, LatentDecoder))
    for band, other in zip(gpu(samples, keys), reference(samples, keys), strict=True):
        assert band.is_cuda
        torch.testing.assert_close(band, other, rtol=0, atol=1e-6)


def test_a_resumed_loader_gives_the_same_bits_on_any_number_of_ranks() -> None:
    dataset = SyntheticImages(images=300, image_size=40, channels=3, classes=10)
    decode = DecodeConfig(
        image_size=32, scales=2, augment=AugmentConfig(flip=True, crop="random_resized")
    )

    def read(start: int, steps: int, *, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
        with Loader(
            dataset,
            config=LoaderConfig(shuffle_block_samples=128),
            decode=decode,
            seed=4,
            batch_images=48,
            rank=rank,
            world_size=ranks,
            device=GPU,
        ) as loader:
            batches = loader.batches(Cursor(start))
            return [merge(next(batches)[0].bands) for _ in range(steps)]

    whole = read(0, 8)
    for got, wanted in zip(read(3 * 48, 5), whole[3:], strict=True):
        assert torch.equal(got, wanted)
    halves = [read(0, 8, rank=rank, ranks=2) for rank in range(2)]
    for wanted, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat(parts), wanted)
