"""The share of a training step that is spent waiting for data."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.data.epochs import Reading, write_places
from benchmarks.data.photographs import add_images, photographs
from benchmarks.workload import Latents, TrainingWork
from models.codec import AutoencoderKlCodec
from models.pyramid import split
from pipelines.ingest.digits import CHANNELS, IMAGE_SIZE, ensure_digits
from pipelines.loading.loader import Batch, Cursor

_DESCRIPTION = """\
Train on real batches: loader, forward, backward and AdamW, and how long each update had to wait for
its batch. `digits` is the main job's data set; `images` are 256-pixel images, encoded on the way by
an autoencoder of Stable Diffusion's size with random weights (--encoder sd, as ImageNet is trained)
or trained on as they are. Without a GPU choose a step that the processor can take.

  python -m benchmarks.data waiting --data digits --size S/2 --depth 4 --batch 64
  python -m benchmarks.data waiting --data images --encoder sd --size XL/2 --precision bf16"""

_WARM_UP = 3
_FACTOR = 8  # pixels of an image for one element of its latent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("data waiting", description=_DESCRIPTION, rounds=1)
    add_images(parser)
    command.add_size(parser, size="S/2", depth=None, batch=64)
    parser.set_defaults(image_size=256, channels=3)
    parser.add_argument("--data", choices=["digits", "images"], default="digits")
    parser.add_argument("--encoder", choices=["none", "sd"], default="none")
    parser.add_argument("--patch", type=command.positive, default=2, help="pixels; default 2")
    parser.add_argument("--scales", type=command.positive, default=2, help="default 2")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=command.positive, default=30, help="updates; default 30")
    parser.add_argument("--samples", type=command.positive, default=2000, help="default 2000")
    parser.add_argument("--decode-threads", type=command.positive, help="default: the loader's")
    options = parser.parse_args(arguments)
    if options.data == "digits":
        options.image_size, options.channels = IMAGE_SIZE, CHANNELS
    setting = command.setting("data waiting", options)
    update = _update(options, setting.device)
    reading = Reading(
        image_size=options.image_size,
        channels=options.channels,
        scales=options.scales if options.encoder == "none" else 1,
        batch=options.batch,
        decode_threads=options.decode_threads,
        device=setting.device,
    )
    # Read in place: the cache stays empty.
    with _dataset(options) as prefix, reading.loader(prefix, cache=Path(prefix).parent) as loader:
        batches = loader.batches(Cursor())
        for _ in range(_WARM_UP):
            update(next(batches)[0])
        waited_s, began = loader.data_wait_s, time.perf_counter()
        for _ in range(options.steps):
            update(next(batches)[0])
        total_s = time.perf_counter() - began
        waited_s = loader.data_wait_s - waited_s
    setting.report.add(
        step_s=total_s / options.steps,
        wait_s=waited_s / options.steps,
        share=waited_s / total_s,
        images_per_s=options.batch * options.steps / total_s,
    )
    setting.deliver()
    return 0


@contextmanager
def _dataset(options: argparse.Namespace) -> Iterator[str]:
    """Write the data set to a temporary folder."""
    if options.data == "digits":
        with TemporaryDirectory(prefix="lapflow-bench-") as folder:
            ensure_digits(folder)
            yield f"{folder}/train"
        return
    files = photographs(options.images, count=400)
    with write_places(files, samples=options.samples, with_s3=False) as places:
        yield places.local


def _update(options: argparse.Namespace, device: torch.device) -> Callable[[Batch], None]:
    """Make the function that trains on one batch and waits for the device."""
    encode = _sd_sized_encoder(device) if options.encoder == "sd" else None
    work = TrainingWork(
        replace(command.sizes(options), patch_size=options.patch),
        scales=options.scales,
        latents=Latents(
            batch=options.batch,
            channels=options.channels if encode is None else 4,
            size=options.image_size // (1 if encode is None else _FACTOR),
        ),
        device=device,
        precision=options.precision,
        optimizer=True,
    )

    def update(batch: Batch) -> None:
        bands = batch.bands
        if encode is not None:
            bands = split(encode(bands[0]), options.scales)
        work.update(bands, batch.labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return update


def _sd_sized_encoder(device: torch.device) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    make: Any = AutoencoderKL
    autoencoder = make(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    ).to(device)
    codec = AutoencoderKlCodec(autoencoder, posterior="mean", encode_precision="bf16")
    return lambda images: codec.encode(images, images.new_empty(len(images), 0))
