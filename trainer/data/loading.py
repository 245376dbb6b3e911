"""Batches of the run's images: how they are decoded, in which order, and in what memory."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

from cluster.contract import WorkerContext
from models.codec import AutoencoderKlCodec, Codec
from pipelines.augment import AugmentConfig
from pipelines.decode.contract import DecodeConfig, LatentDecodeConfig
from pipelines.loading.loader import Loader
from trainer import rng
from trainer.config.job import JobConfig
from trainer.config.shapes import encodes, picture_shape
from trainer.data.splits import Split

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_LIMIT_BYTES = 4 << 20


def training_loader(
    job: JobConfig, split: Split, context: WorkerContext, *, codec: Codec
) -> Loader:
    """Build the loader of this rank's share of every global batch.

    It splits images, or stored latents, into the flow's bands, or leaves images whole where the
    codec comes before.
    """
    seed = rng.derive_seed(job.train.seed, "order")
    decode: DecodeConfig | LatentDecodeConfig
    if split.latents is None:
        scales = 1 if encodes(job) else job.flow.scales
        decode = decoding(job, context, scales=scales, augment=job.data.augment)
    else:
        assert isinstance(codec, AutoencoderKlCodec)
        decode = LatentDecodeConfig(
            format=split.latents,
            scales=job.flow.scales,
            scale=codec.scale,
            shift=codec.shift,
            posterior=job.codec.posterior,
            flip=job.data.augment.flip,
            decode_threads=job.loader.threads_for(context.local_world_size),
        )
    return Loader(
        split.dataset,
        config=job.loader,
        decode=decode,
        seed=seed,
        order=split.order(seed=seed, block_samples=job.loader.shuffle_block_samples),
        batch_images=job.train.global_batch,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        classes=job.data.classes,
    )


def decoding(
    job: JobConfig, context: WorkerContext, *, scales: int, augment: AugmentConfig | None = None
) -> DecodeConfig:
    """Say how stored images become pictures, or the bands of pictures.

    Args:
        job: The configuration.
        context: Place of this worker, whose node's cores its ranks share.
        scales: Number of bands; 1 leaves images whole.
        augment: How crops vary; None takes the central square.
    """
    shape = picture_shape(job.data, job.codec)
    return DecodeConfig(
        image_size=shape.size,
        channels=1 if shape.channels == 1 else 3,
        scales=scales,
        decode_threads=job.loader.threads_for(context.local_world_size),
        augment=augment or AugmentConfig(),
    )


def return_large_blocks() -> None:
    """Have blocks from 4 MiB on go back to the system when they are freed.

    glibc raises that limit, up to 32 MiB, each time such a block is freed, and from then on takes
    blocks below it from the heap, which batches of images cut into pieces: the memory of a loader
    that decodes on the host doubled over 12,000 images (docs/benchmarks.md). Other C libraries do
    not know the setting and need none. MALLOC_MMAP_THRESHOLD_ in the environment goes first.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LIMIT_BYTES)
