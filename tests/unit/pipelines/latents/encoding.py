"""Images to encode, and what is found afterwards."""

from pathlib import Path

import numpy as np
import torch

from models.codec import AutoencoderKlCodec
from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import make_decoder
from pipelines.ingest.encode import plan_encoding
from pipelines.ingest.latent_config import EncodeConfig, Encoder
from pipelines.shards import ShardedDataset, ShardsConfig
from trainer.cli.latents import main

IMAGES, SIZE, BATCH = 23, 32, 7
SETTINGS = ("--image-size", str(SIZE), "--batch", str(BATCH))
# 5 latents of 2 views of 2 moments of 4 x 4 x 4 numbers of float32.
SMALL = EncodeConfig(
    image_size=SIZE, dtype="float32", batch=3, shard_bytes=5 * 1024, shards=ShardsConfig()
)


def command(place: Path, target: Path | str, *more: str) -> int:
    source, autoencoder = str(place / "images"), str(place / "autoencoder")
    return main([source, str(target), "--autoencoder", autoencoder, *SETTINGS, *more])


def encode(source: Path, target: Path, encoder: Encoder, config: EncodeConfig = SMALL) -> list[str]:
    notes: list[str] = []
    plan_encoding(str(source), str(target), encoder=encoder, config=config).carry_out(notes.append)
    return notes


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(prefix: Path | str) -> np.ndarray:
    """Moments of all samples, [samples, views, mean and deviation, channels, height, width]."""
    dataset = ShardedDataset(str(prefix))
    form = dataset.latents
    assert form is not None
    data = b"".join(dataset.read(number).data for number in range(len(dataset)))
    return np.frombuffer(data, form.dtype).reshape(-1, *form.shape)


def by_hand(place: Path, codec: AutoencoderKlCodec, decoder: str) -> torch.Tensor:
    """What the codec itself gives for the images of the training split and their mirror images."""
    dataset = ShardedDataset(str(place / "images" / "train"))
    decode = make_decoder(decoder, DecodeConfig(image_size=SIZE, scales=1), device="cpu")
    batches = []
    for first in range(0, len(dataset), BATCH):
        ids = range(first, min(first + BATCH, len(dataset)))
        (images,) = decode([dataset.read(number).data for number in ids])
        views = [torch.stack(codec.moments(view), 1) for view in (images, images.flip(-1))]
        batches.append(torch.stack(views, 1))
    return torch.cat(batches)
