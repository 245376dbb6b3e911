"""Samples drawn from a model, spread over ranks, the same whatever the number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler import Samples, sample
from models.flow.sampler_config import SamplerConfig, SamplerConfigError
from pipelines.progress import Progress, figures_in
from trainer import rng
from trainer.config.shapes import ImageShape
from trainer.host_group import HostGroup

logger = logging.getLogger(__name__)

_REPORT_INTERVAL_S = 10.0
"""Between two lines about images that take long to draw."""


@dataclass(frozen=True, kw_only=True)
class SampleBlock:
    """Samples that were drawn together.

    Attributes:
        first: Index of the first one.
        images: Shape [n, c, h, w], on the host, in [-1, 1] or slightly beyond.
        labels: Their classes, shape [n].
        nfe: Network evaluations for each image in each segment.
    """

    first: int
    images: Tensor
    labels: Tensor
    nfe: tuple[float, ...]

    def to_bytes(self) -> bytes:
        """Return the block as safetensors."""
        return save(
            {
                "first": torch.tensor(self.first),
                "images": self.images.contiguous(),
                "labels": self.labels.contiguous(),
                "nfe": torch.tensor(self.nfe, dtype=torch.float64),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> SampleBlock:
        """Rebuild a block from `to_bytes`."""
        tensors = load(data)
        return cls(
            first=int(tensors["first"]),
            images=tensors["images"],
            labels=tensors["labels"],
            nfe=tuple(tensors["nfe"].tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class ImageSampler:
    """Everything that decides samples but the model; image i depends on (seed, i, its label) alone.

    Images are drawn in blocks of equal size, at most `batch`, which do not depend on the number of
    ranks. So neither does any bit of them, on one kind of processor.

    Attributes:
        flow: The flow that the model was trained with.
        sampler: Solver, steps and guidance.
        shape: What to draw, before it is decoded.
        codec: Makes images of it.
        seed: Seed of the noise.
        batch: Most images in one network call.
        device: Where the model is.

    Raises:
        SamplerConfigError: ``batch`` is below 1.
    """

    flow: Flow
    sampler: SamplerConfig
    shape: ImageShape
    codec: Codec
    seed: int
    batch: int
    device: torch.device

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise SamplerConfigError(f"a batch of {self.batch} images must have at least 1.")

    def all(self, model: nn.Module, labels: Tensor, *, ranks: HostGroup | None = None) -> Samples:
        """Draw one image for each label; a collective call.

        Args:
            model: Velocity model.
            labels: Requested classes, shape [n].
            ranks: Those that draw; None is this process by itself.

        Returns:
            On the first rank all images, on the others none, with the network evaluations.
        """
        pixels = self.shape.size * self.codec.factor
        images = [torch.zeros(0, self.codec.image_channels(self.shape.channels), pixels, pixels)]
        nfe = torch.zeros(self.flow.stages.scales, dtype=torch.float64)
        for block in self.blocks(model, labels, ranks=ranks):
            images.append(block.images)
            nfe += len(block.images) * torch.tensor(block.nfe, dtype=torch.float64)
        return Samples(images=torch.cat(images), nfe=tuple((nfe / len(labels)).tolist()))

    @torch.no_grad()
    def blocks(
        self, model: nn.Module, labels: Tensor, *, ranks: HostGroup | None = None
    ) -> Generator[SampleBlock]:
        """Draw one image for each label, block by block; a collective call.

        Every rank draws its share of the blocks and walks through this iterator. All ranks call the
        model equally often with equally many images, so its weights may be spread over them. The
        first rank, which gets the blocks, holds one of them at a time and may take as long as it
        likes over each. Where it leaves early it has to close the iterator, which also ends the
        others' drawing.

        Args:
            model: Velocity model.
            labels: Requested classes, shape [n].
            ranks: Those that draw; None is this process by itself.

        Yields:
            The blocks in order, on the first rank alone.
        """
        ranks = ranks or HostGroup(alone=True)
        size = -(-len(labels) // -(-len(labels) // self.batch)) if len(labels) else 1
        starts = range(0, len(labels), size)
        with Progress(
            "drawing images",
            len(labels),
            report=partial(logger.info, "%s"),
            line=lambda pace: f"{pace.done:.0f} of {pace.total} images are drawn",
            figures=figures_in("images"),
            every_s=_REPORT_INTERVAL_S,
            last=False,
        ) as progress:
            for turn in range(0, len(starts), ranks.world_size):
                # Ranks that are left over in the last turn draw the last block too, to keep step.
                first = starts[min(turn + ranks.rank, len(starts) - 1)]
                own = self._block(model, labels, first, size)
                left = False
                for source in range(min(ranks.world_size, len(starts) - turn)):
                    if ranks.rank == 0:
                        block = own
                        if source > 0:
                            block = SampleBlock.from_bytes(ranks.receive(source))
                        progress.add(len(block.images))
                        try:
                            if not left:
                                yield block
                        except GeneratorExit:
                            left = True  # the others are still handing theirs over
                    elif ranks.rank == source:
                        ranks.send(own.to_bytes(), to=0)
                if ranks.broadcast(bytes([left]), source=0) != bytes([False]):
                    return

    def _block(self, model: nn.Module, labels: Tensor, first: int, size: int) -> SampleBlock:
        """Draw images first … first + size - 1; those beyond the last label are thrown away."""
        own = labels[first : first + size]
        padded = torch.nn.functional.pad(own, (0, size - len(own)))
        shape = {"channels": self.shape.channels, "image_size": self.shape.size}
        drawn = sample(
            model,
            flow=self.flow,
            config=self.sampler,
            noise=rng.normals(
                self.seed,
                "samples",
                first=first,
                count=size,
                size=self.flow.noise_size(**shape),
                device=self.device,
            ),
            labels=padded.to(self.device),
            null_label=self.shape.classes,
            **shape,
        )
        return SampleBlock(
            first=first,
            images=self.codec.decode(drawn.images[: len(own)]).cpu(),
            labels=own,
            nfe=drawn.nfe,
        )
