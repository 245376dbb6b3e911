"""The run's images: splits opened from the store, batches for training, real images to compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cluster.contract import WorkerContext
from pipelines.decode import DecodeConfig, make_decoder
from pipelines.loader import Loader
from pipelines.shards import ShardedDataset
from pipelines.view import AugmentConfig
from trainer import places, rng
from trainer.schema import ConfigError, JobConfig, encodes

_REAL_BATCH = 256


def open_split(job: JobConfig, split: str) -> ShardedDataset:
    """Open "train" or "test" of the job's data set.

    Raises:
        DataError: If the data set is missing, empty, damaged or out of reach.
        ConfigError: For latents, which the loader does not read yet.
    """
    if job.data.space != "pixel":
        raise ConfigError(
            f"data.space={job.data.space} cannot be trained yet: the loader reads images only; "
            "dry_run=true works, data.space=pixel trains"
        )
    cache_dir = job.shards.cache_dir or str(places.cache(job))
    return ShardedDataset(
        f"{places.data_prefix(job)}/{split}", config=replace(job.shards, cache_dir=cache_dir)
    )


def training_loader(job: JobConfig, images: ShardedDataset, context: WorkerContext) -> Loader:
    """Build the loader of this rank's share of every global batch.

    It splits images into the flow's bands, or leaves them whole where a codec comes before.
    """
    return Loader(
        images,
        config=job.loader,
        decode=_decoding(
            job, scales=1 if encodes(job) else job.flow.scales, augment=job.data.augment
        ),
        seed=rng.derived_seed(job.train.seed, "order"),
        batch_images=job.train.global_batch,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        classes=job.data.classes,
    )


def real_images(
    job: JobConfig, split: str, context: WorkerContext
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield whole images [b, c, h, w] in [-1, 1] and labels [b] of a split, in stored order."""
    images = open_split(job, split)
    decoder = make_decoder(job.loader.decoder, _decoding(job, scales=1), device=context.device)
    for start in range(0, len(images), _REAL_BATCH):
        raw = [images.read(index) for index in range(start, min(start + _REAL_BATCH, len(images)))]
        (pictures,) = decoder([image.data for image in raw])
        yield pictures.cpu(), torch.tensor([image.label for image in raw])


def _decoding(job: JobConfig, *, scales: int, augment: AugmentConfig | None = None) -> DecodeConfig:
    return DecodeConfig(
        image_size=job.data.image_size,
        channels=1 if job.data.channels == 1 else 3,
        scales=scales,
        augment=augment or AugmentConfig(),
    )
