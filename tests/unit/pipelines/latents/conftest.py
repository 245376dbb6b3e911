"""A dataset of images, a small autoencoder, and the latents of both."""

from functools import partial
from pathlib import Path

import pytest
import torch

from models.codec import AutoencoderKlCodec
from pipelines.ingest.latent_config import Encoder
from pipelines.ingest.write import LabelledImage, write_dataset
from tests.support.autoencoder import saved_autoencoder
from tests.unit.pipelines import pictures
from tests.unit.pipelines.latents.encoding import IMAGES, command
from trainer.autoencoder.codec import open_codec, open_encoder
from trainer.autoencoder.files import find_autoencoder
from trainer.storage.store import StoreConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    saved_autoencoder(folder / "autoencoder", channels=3)
    for name, count, first in (("train", IMAGES, 0), ("test", 4, 100)):
        data = [pictures.png(40, 36, seed=first + place) for place in range(count)]
        images = [LabelledImage(image, place % 3) for place, image in enumerate(data)]
        write_dataset(images, str(folder / "images" / name), shard_bytes=20_000)
    return folder


@pytest.fixture(scope="module")
def encoder(place: Path) -> Encoder:
    files = find_autoencoder(str(place / "autoencoder"), cache=place, store=StoreConfig())
    return Encoder(
        place="here",
        sha256=files.sha256,
        factor=8,
        channels=4,
        image_channels=3,
        scale=files.settings.scaling_factor,
        shift=files.settings.shift_factor or 0.0,
        precision="fp32",
        load=partial(open_encoder, files, precision="fp32"),
    )


@pytest.fixture(scope="module")
def codec(place: Path) -> AutoencoderKlCodec:
    files = find_autoencoder(str(place / "autoencoder"), cache=place, store=StoreConfig())
    return open_codec(files, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def encoded(place: Path) -> Path:
    """Both splits in float32, by the command."""
    assert command(place, place / "latents", "--dtype", "float32") == 0
    return place / "latents"
