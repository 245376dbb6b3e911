"""Samples drawn from a model, spread over ranks, the same whatever the number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler import Samples, SolverError, sample
from models.flow.sampler_config import SamplerConfig, whole_layouts
from models.flow.solver import Observer, unobserved
from pipelines.progress import Progress, figures_in
from trainer import rng
from trainer.config.shapes import ImageShape
from trainer.engine.expert_shards import shards_of
from trainer.evaluation.config import Precision
from trainer.evaluation.precision import products_in
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

    @property
    def indices(self) -> Tensor:
        """Index of each image, shape [n]."""
        return torch.arange(self.first, self.first + len(self.images))

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
class Turn:
    """The blocks that all ranks have drawn at the same time.

    Attributes:
        own: This rank's; None where there are fewer blocks than ranks, and none is left for it.
        firsts: Index of the first image of each block, in the order of the ranks.
        size: Images of a block; the run's last one may have fewer.
    """

    own: SampleBlock | None
    firsts: range
    size: int

    def gather(
        self, ranks: HostGroup, *, wanted: Callable[[range], bool] = lambda _: True
    ) -> Iterator[SampleBlock]:
        """Hand blocks to the first rank; a collective call, walked through on every rank.

        Args:
            ranks: Those that drew.
            wanted: Tells by its images' indices whether a block is needed; alike on all ranks.

        Yields:
            The wanted blocks in order, on the first rank alone.
        """
        for source, first in enumerate(self.firsts):
            if not wanted(range(first, first + self.size)):
                continue
            if ranks.rank == source and self.own is not None:
                if source == 0:
                    yield self.own
                else:
                    ranks.send(self.own.to_bytes(), to=0)
            elif ranks.rank == 0:
                yield SampleBlock.from_bytes(ranks.receive(source))


@dataclass(frozen=True, kw_only=True)
class ImageSampler:
    """Everything that decides samples but the model; image i depends on (seed, i, its label) alone.

    Where images share their coarse scales, it depends also on the first image of its layout: images
    `share_coarse` times i and those that follow it have that one's coarse noise, and its label.

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
        precision: What the model computes in.
        share_coarse: How many images are variations of one layout.

    Raises:
        SamplerConfigError: ``batch`` is below 1, or no layout fits into it.
    """

    flow: Flow
    sampler: SamplerConfig
    shape: ImageShape
    codec: Codec
    seed: int
    batch: int
    device: torch.device
    precision: Precision = "fp32"
    share_coarse: int = 1

    def __post_init__(self) -> None:
        _ = self.most

    @property
    def most(self) -> int:
        """Most images in one network call that are whole layouts."""
        return whole_layouts(self.batch, self.share_coarse)

    @property
    def picture_bytes(self) -> int:
        """Size of an image as an 8-bit picture."""
        size = self.shape.size * self.codec.factor
        return self.codec.image_channels(self.shape.channels) * size**2

    def all(self, model: nn.Module, labels: Tensor, *, ranks: HostGroup | None = None) -> Samples:
        """Draw one image for each label; a collective call.

        Args:
            model: Velocity model.
            labels: Requested classes, shape [n].
            ranks: Those that draw; None is this process by itself.

        Returns:
            On the first rank all images, on the others none, with the network evaluations.

        Raises:
            SolverError: The solver comes to no end; on all ranks, whose ever images they are.
        """
        pixels = self.shape.size * self.codec.factor
        images = [torch.zeros(0, self.codec.image_channels(self.shape.channels), pixels, pixels)]
        nfe = torch.zeros(self.flow.stages.scales, dtype=torch.float64)
        for block in self.blocks(model, labels, ranks=ranks):
            images.append(block.images)
            nfe += len(block.images) * torch.tensor(block.nfe, dtype=torch.float64)
        return Samples(images=torch.cat(images), nfe=tuple((nfe / len(labels)).tolist()))

    @torch.no_grad()
    def turns(self, model: nn.Module, labels: Tensor, *, ranks: HostGroup) -> Generator[Turn]:
        """Draw one image for each label, a block on each rank in each turn; a collective call.

        All ranks call the model equally often with equally many images, so its weights may be
        spread over them.

        Args:
            model: Velocity model.
            labels: Requested classes, shape [n].
            ranks: Those that draw.

        Yields:
            On every rank its own block of each turn.

        Raises:
            SolverError: The solver comes to no end; on all ranks, whose ever images they are.
        """
        blocks = max(1, -(-len(labels) // self.most))
        size = max(1, -(-len(labels) // (blocks * self.share_coarse))) * self.share_coarse
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
            for number in range(0, len(starts), ranks.world_size):
                firsts = starts[number : number + ranks.world_size]
                # Ranks that are left over in the last turn draw the last block too, to keep step.
                place = min(ranks.rank, len(firsts) - 1)
                block = self._agreed_block(ranks, model, labels, firsts[place], size)
                if ranks.rank == 0:
                    progress.add(len(labels[firsts[0] : firsts[-1] + size]))
                yield Turn(own=block if place == ranks.rank else None, firsts=firsts, size=size)

    def blocks(
        self, model: nn.Module, labels: Tensor, *, ranks: HostGroup | None = None
    ) -> Generator[SampleBlock]:
        """Draw one image for each label and hand all to the first rank; a collective call.

        Every rank draws its share of the blocks and walks through this iterator. The first rank,
        which gets the blocks, holds one of them at a time and may take as long as it likes over
        each. Where it leaves early it has to close the iterator, which also ends the others'
        drawing.

        Args:
            model: Velocity model.
            labels: Requested classes, shape [n].
            ranks: Those that draw; None is this process by itself.

        Yields:
            The blocks in order, on the first rank alone.

        Raises:
            SolverError: The solver comes to no end; on all ranks, whose ever images they are.
        """
        ranks = ranks or HostGroup(alone=True)
        for turn in self.turns(model, labels, ranks=ranks):
            left = False
            for block in turn.gather(ranks):
                try:
                    if not left:
                        yield block
                except GeneratorExit:
                    left = True  # the others are still handing theirs over
            if ranks.broadcast(bytes([left]), source=0) != bytes([False]):
                return

    def _agreed_block(
        self, ranks: HostGroup, model: nn.Module, labels: Tensor, first: int, size: int
    ) -> SampleBlock:
        """Draw a block on each rank, or raise on all of them: none waits for one that has left.

        Raises:
            SolverError: The solver comes to no end on some rank, or its device has no memory left.
            torch.OutOfMemoryError: The same where ranks hold shards of experts: the others wait
                for this one in the midst of the network, until it ends.
        """
        own, mistake = None, ""
        try:
            own = self.block(model, labels[first : first + size], first=first, size=size)
        except SolverError as error:
            mistake = str(error)
        except torch.OutOfMemoryError as error:
            if shards_of(model):
                raise
            torch.cuda.empty_cache()  # what it had got is for training again
            why = str(error).partition("\n")[0]
            mistake = (
                f"{size} images at once do not fit into memory; lower eval.batch, or batch where a "
                f"command draws of a checkpoint ({why})"
            )
        if (told := ranks.first_mistake(mistake)) or own is None:
            raise SolverError(told)
        return own

    @torch.no_grad()
    def block(self, model: nn.Module, labels: Tensor, *, first: int, size: int) -> SampleBlock:
        """Draw one image for each label in one batch, by this process alone.

        Args:
            model: Velocity model.
            labels: Requested classes, shape [n].
            first: Index of the first image.
            size: Images in the batch, at least n; those beyond the last label are thrown away.

        Raises:
            SolverError: The solver comes to no end.
        """
        drawn = self.on_device(model, labels, first=first, size=size)
        return SampleBlock(first=first, images=drawn.images.cpu(), labels=labels, nfe=drawn.nfe)

    @torch.no_grad()
    def on_device(self, model: nn.Module, labels: Tensor, *, first: int, size: int) -> Samples:
        """Draw images as `block` does, and leave them where they are made: [n, c, h, w]."""
        padded = torch.nn.functional.pad(labels, (0, size - len(labels)))
        drawn = self.from_noise(model, self.noise(first=first, count=size), padded)
        images = self.decoded(drawn.images[: len(labels)])
        return Samples(images=images, nfe=drawn.nfe)

    @torch.no_grad()
    def decoded(self, drawn: Tensor) -> Tensor:
        """Return what was drawn as images, [n, c, h, w], on the device."""
        with products_in(self.precision, self.device):
            return self.codec.decode(drawn)

    def noise(self, *, first: int, count: int) -> Tensor:
        """Return the noise of consecutive images, [count, numbers for one], on the device."""
        size = self.flow.noise_size(channels=self.shape.channels, image_size=self.shape.size)
        return rng.normals(
            self.seed, "samples", first=first, count=count, size=size, device=self.device
        )

    @torch.no_grad()
    def from_noise(
        self, model: nn.Module, noise: Tensor, labels: Tensor, *, observe: Observer = unobserved
    ) -> Samples:
        """Turn noise into what the codec decodes, in one batch.

        Args:
            model: Velocity model.
            noise: As `noise` gives it, for n images.
            labels: Requested classes, shape [n]; of images of one layout the first one's counts.
            observe: Sees the states on the way, see `models.flow.sampler.sample`.

        Raises:
            SolverError: The solver comes to no end.
        """
        with products_in(self.precision, self.device):
            return sample(
                model,
                flow=self.flow,
                config=self.sampler,
                noise=noise,
                labels=labels.to(self.device),
                channels=self.shape.channels,
                image_size=self.shape.size,
                null_label=self.shape.classes,
                share_coarse=self.share_coarse,
                observe=observe,
            )
