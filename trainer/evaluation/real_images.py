"""The real images that samples are compared with, and whether there are enough of them to do so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cluster.contract import WorkerContext
from pipelines.decode.contract import Decoder
from pipelines.decode.make import make_decoder
from pipelines.errors import (
    BadDataError,
    BadSampleError,
    CorruptShardError,
    MissingShardError,
    UndecodableImageError,
)
from pipelines.formats import format_bytes
from pipelines.loading.bad_samples import BadSamples
from pipelines.shards import ShardedDataset
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import picture_shape
from trainer.data.loading import decoding
from trainer.data.splits import Split, open_images
from trainer.evaluation.frechet import MIN_IMAGES, MIN_IMAGES_IN_HALVES

_AT_ONCE = 256
_MAX_HELD_BYTES = 4 * 2**30
_HOLD_OUT_MORE = (
    "hold out more images of the data set, as --hold-out of python -m pipelines.ingest does"
)


class RealImages:
    """Whole images [b, c, h, w] in [-1, 1] and labels [b] of a split, in stored order.

    Images that cannot be used, and those of lost shards, are left out, as far as
    `loader.max_bad_fraction` allows: a warning names each. Where the run reads latents, the images
    are those that the latents were made of.

    Args:
        job: The configuration.
        split: "train" or "test".
        context: Says where images are decoded.
    """

    def __init__(self, job: JobConfig, split: str, context: WorkerContext) -> None:
        self._job = job
        self._split = split
        self._context = context

    @property
    def digest(self) -> str:
        """SHA-256 of their index."""
        return self._opened.digest

    def __len__(self) -> int:
        """Return how many are stored, whether they can be used or not."""
        return len(self._opened)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the split.

        Raises:
            DataError: If it is out of reach, or more images than allowed cannot be used, or too few
                are left of it to measure by.
        """
        usable = 0
        device = self._context.device
        config = decoding(self._job, self._context, scales=1)
        decoder = make_decoder(self._job.loader.decoder, config, device=device)
        for images in self._opened.streams:
            bad = BadSamples(images, max_fraction=self._job.loader.max_bad_fraction)
            for start in range(0, len(images), _AT_ONCE):
                ids = range(start, min(start + _AT_ONCE, len(images)))
                for batch in _usable(images, ids, decoder=decoder, bad=bad):
                    usable += len(batch[1])
                    yield batch
        if usable < MIN_IMAGES:
            raise BadDataError(
                f"Of {len(self)} images of the split {self._split} only {usable} can be used, and "
                f"figures need at least {MIN_IMAGES}. Check the dataset with python -m "
                "pipelines.ingest verify, and restore its files or write it again."
            )

    @cached_property
    def _opened(self) -> Split:
        return open_images(self._job, self._split)


def check_measurable(job: JobConfig, *, report: Callable[[str], None]) -> None:
    """Find out before a run whether its end can be measured.

    Args:
        job: The configuration.
        report: Takes a line for the user.

    Raises:
        ConfigError: If there are too few held-out images, or more than fit into memory where they
            have to.
        DataError: If they are missing or out of reach.
    """
    held_out = check_held_out(job)
    if held_out < MIN_IMAGES_IN_HALVES:
        report(
            f"warning: with {held_out} held-out images the distance between two halves of them is "
            f"left out, which needs {MIN_IMAGES_IN_HALVES}, and the Fréchet distance says "
            f"little; {_HOLD_OUT_MORE}"
        )
    check_held(job, [job.eval.features.name], classifier=job.eval.classifier)


def check_held_out(job: JobConfig) -> int:
    """Return how many held-out images are stored.

    Raises:
        ConfigError: They are too few to measure anything by.
        DataError: They are missing or out of reach.
    """
    held_out = len(open_images(job, "test"))
    if held_out < MIN_IMAGES:
        images = "image" if held_out == 1 else "images"
        raise ConfigError(
            f"data.name={job.data.name} has {held_out} held-out {images}, and a Fréchet distance "
            f"needs at least {MIN_IMAGES}: {_HOLD_OUT_MORE}"
        )
    return held_out


def check_held(job: JobConfig, features: Collection[str], *, classifier: bool) -> None:
    """Refuse figures that need more images in memory at once than it may hold.

    Args:
        job: The configuration.
        features: Names of the extractors.
        classifier: Whether a classifier of real images reads the samples.

    Raises:
        ConfigError: If so, with the size.
    """
    shape = picture_shape(job.data, job.codec)
    asked = {
        "learned_conv among the features": "learned_conv" in features,
        "eval.classifier=true": classifier,
    }
    for what in (name for name, wanted in asked.items() if wanted):
        images = len(open_images(job, "train"))
        size_bytes = images * shape.channels * shape.size**2 * torch.float32.itemsize
        if size_bytes > _MAX_HELD_BYTES:
            raise ConfigError(
                f"{what} holds all {images:,} training images in memory, "
                f"{format_bytes(size_bytes)} in float32, and is made for small images, up to "
                f"{format_bytes(_MAX_HELD_BYTES)}; choose inception or random_conv for the "
                "features, and eval.classifier=false"
            )


def _usable(
    images: ShardedDataset, ids: range, *, decoder: Decoder[Any], bad: BadSamples
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read and decode some images together, but for those that cannot be."""
    bad.count_read(len(ids))
    found: list[tuple[int, int, Any]] = []
    for sample_id in ids:
        try:
            raw = images.read(sample_id)
            found.append((sample_id, raw.label, decoder.prepare(raw.data, None)))
        except (MissingShardError, CorruptShardError, BadSampleError) as error:
            bad.tolerate(sample_id, reason=str(error).split(". ")[0], attempt=0)
    while found:
        try:
            (pictures,) = decoder.decode([prepared for _, _, prepared in found])
        except UndecodableImageError as error:
            for place in error.indices:
                bad.tolerate(found[place][0], reason=error.reason, attempt=0)
            found = [each for place, each in enumerate(found) if place not in error.indices]
            continue
        yield pictures.cpu(), torch.tensor([label for _, label, _ in found])
        return
