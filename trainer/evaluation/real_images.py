"""The real images that samples are compared with, and whether there are enough of them to do so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

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
from pipelines.progress import Progress, figures_in
from pipelines.shards import ShardedDataset
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.config.shapes import picture_shape
from trainer.data.loading import decoding
from trainer.data.splits import Split, open_images
from trainer.evaluation.npz import check_reference
from trainer.evaluation.sums import MIN_IMAGES
from trainer.host_group import HostGroup

logger = logging.getLogger(__name__)

_AT_ONCE = 256
_TELLING_IMAGES = 4
_REPORT_INTERVAL_S = 10.0
_MAX_HELD_BYTES = 4 * 2**30
HOLD_OUT_MORE = (
    "hold out more images of the data set, as --hold-out of python -m pipelines.ingest does"
)


class RealBatch(NamedTuple):
    """Real images that can be used.

    Attributes:
        images: Shape [b, c, h, w], in [-1, 1].
        labels: Shape [b].
        indices: Place of each among those that are read, shape [b].
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


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
        for batch in self.share():
            usable += len(batch.labels)
            yield batch.images, batch.labels
        self.check_usable(usable)

    def share(
        self, ranks: HostGroup | None = None, *, ids: Tensor | None = None
    ) -> Iterator[RealBatch]:
        """Read this rank's part of the split; together the ranks read all of it.

        Args:
            ranks: Those that read; None is this process by itself.
            ids: Rising places in the split of what is read; None is all.

        Raises:
            DataError: If it is out of reach, or more images than allowed cannot be used.
        """
        rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        device = self._context.device
        config = decoding(self._job, self._context, scales=1)
        decoder = make_decoder(self._job.loader.decoder, config, device=device)
        wanted = torch.arange(len(self)) if ids is None else ids
        before, turn, index = 0, 0, 0
        with _progress(len(wanted), is_shown=rank == 0) as progress:
            for images in self._opened.streams:
                bad = BadSamples(images, max_fraction=self._job.loader.max_bad_fraction)
                own = wanted[(wanted >= before) & (wanted < before + len(images))] - before
                before += len(images)
                for chunk in torch.split(own, _AT_ONCE):
                    if turn % world_size == rank:
                        for batch in _usable(images, chunk.tolist(), decoder=decoder, bad=bad):
                            places = torch.searchsorted(chunk, batch.indices)
                            yield batch._replace(indices=places + index)
                    turn, index = turn + 1, index + len(chunk)
                    progress.add(len(chunk))

    def check_usable(self, usable: int) -> None:
        """Refuse to measure by too few images.

        Raises:
            DataError: If no more than `usable` images can be used, and they are too few.
        """
        if usable < MIN_IMAGES:
            raise BadDataError(
                f"Of {len(self)} images of the split {self._split} only {usable} can be used, and "
                f"figures need at least {MIN_IMAGES}. Check the dataset with python -m "
                "pipelines.ingest verify, and restore its files or write it again."
            )

    @cached_property
    def _opened(self) -> Split:
        return open_images(self._job, self._split)


def _progress(images: int, *, is_shown: bool) -> Progress:
    return Progress(
        "reading images",
        images,
        report=lambda line: logger.log(logging.INFO if is_shown else logging.DEBUG, "%s", line),
        line=lambda pace: f"{pace.done:.0f} of {pace.total} real images are read",
        figures=figures_in("images"),
        every_s=_REPORT_INTERVAL_S,
        last=False,
    )


def check_measurable(job: JobConfig, *, report: Callable[[str], None]) -> None:
    """Find out before a run whether its end can be measured.

    Args:
        job: The configuration.
        report: Takes a line for the user.

    Raises:
        ConfigError: If there are more images than fit into memory where they have to.
        DataError: If they are missing or out of reach.
        BadReference: If there is no file of statistics where one is named.
    """
    if few := few_held_out(len(open_images(job, "test"))):
        left_out = "no figure is measured at the end, as samples are compared with held-out images"
        if job.eval.reference != "test":
            left_out = "what real images reach is left out of the figures"
        report(f"warning: data.name={job.data.name} has {few}: {left_out}; {HOLD_OUT_MORE}")
    check_held(job, [job.eval.features.name], classifier=job.eval.classifier)
    if job.eval.reference == "train":
        open_images(job, "train")
    elif job.eval.reference != "test":
        check_reference(job.eval.reference, job.store)


def few_held_out(images: int) -> str:
    """Say that so many held-out images are too few to measure by; "" where they are not."""
    if images >= _TELLING_IMAGES:
        return ""
    counted = f"{images} held-out image" if images == 1 else f"{images or 'no'} held-out images"
    return f"{counted}, and figures need {_TELLING_IMAGES}"


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
    images: ShardedDataset, ids: Sequence[int], *, decoder: Decoder[Any], bad: BadSamples
) -> Iterator[RealBatch]:
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
        labels = torch.tensor([label for _, label, _ in found])
        yield RealBatch(pictures.cpu(), labels, torch.tensor([each for each, _, _ in found]))
        return
