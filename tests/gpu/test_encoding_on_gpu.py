"""Latents encoded on a GPU: those of the CPU but for rounding, by one process or by two."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec import AutoencoderKlCodec
from models.products import float32_products
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset
from tests.support.autoencoder import saved_autoencoder, tiny_autoencoder
from tests.unit.pipelines import pictures
from trainer.cli.latents import main
from trainer.evaluation.features import IndexedExtraction, RandomConvFeatures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moments(prefix: Path) -> np.ndarray:
    dataset = ShardedDataset(str(prefix))
    assert dataset.latents is not None
    data = b"".join(dataset.read(number).data for number in range(len(dataset)))
    return np.frombuffer(data, dataset.latents.dtype).reshape(-1, *dataset.latents.shape)


def test_latents_are_those_of_the_cpu_but_for_rounding(tmp_path: Path) -> None:
    saved_autoencoder(tmp_path / "autoencoder", channels=3)
    images = [LabelledImage(pictures.png(64, 64, seed=seed), seed % 3) for seed in range(300)]
    write_dataset(images, str(tmp_path / "images" / "train"))

    def encoded(name: str, *options: str) -> np.ndarray:
        words = ["images", name, "--autoencoder", "autoencoder"]
        places = [word if word.startswith("--") else str(tmp_path / word) for word in words]
        # 8 KiB a sample, so three shards.
        size = ["--image-size", "64", "--dtype", "float32", "--shard-mib", "1"]
        assert main([*places, *size, *options]) == 0
        return moments(tmp_path / name / "train")

    cpu = encoded("cpu", "--devices", "cpu", "--decoder", "pillow")
    one = encoded("one", "--devices", "cuda:0")
    two = encoded("two", "--devices", "cuda:0", "--workers", "2")
    rounded = encoded("rounded", "--devices", "cuda:0", "--precision", "bf16")
    deviation = cpu.std()
    for other, limit in ((one, 2**-8), (two, 2**-8), (rounded, 2**-5)):
        assert other.shape == cpu.shape
        # Float32 is added up in other orders, and bf16 has 7 bits of mantissa.
        assert np.sqrt(np.square(other - cpu).mean()) < limit * deviation


def test_latents_and_features_do_not_depend_on_what_a_training_allows() -> None:
    device = torch.device("cuda")
    codec = AutoencoderKlCodec(tiny_autoencoder(channels=3).to(device))
    images = torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    places, features, moments = torch.arange(32), [], []
    extraction = IndexedExtraction(
        RandomConvFeatures(3), device=device, take=lambda values, *_: features.append(values)
    )
    for allowed in (True, False):
        with float32_products(device, tf32=allowed):
            extraction.add(images, places, places)
            extraction.flush()
            moments.append(codec.moments(images.to(device)))
    for ones, others in (features, *zip(*moments, strict=True)):
        torch.testing.assert_close(ones, others, rtol=1e-6, atol=1e-6)
