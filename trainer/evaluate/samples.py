"""Samples drawn from a model, spread over ranks, the same whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler import Samples, images_per_call, sample
from models.flow.sampler_config import SamplerConfig
from trainer import rng


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """Shape of what the flow works on, an image or its latent, and the number of classes.

    Attributes:
        channels: Channels.
        size: Height and width in elements.
        classes: Labels are 0 … classes - 1; index `classes` is the null label.
    """

    channels: int
    size: int
    classes: int


@torch.no_grad()
def draw(
    model: nn.Module,
    *,
    flow: Flow,
    config: SamplerConfig,
    shape: ImageShape,
    codec: Codec,
    labels: Tensor,
    seed: int,
    batch: int,
    device: torch.device,
    first_image: int = 0,
) -> Samples:
    """Sample one image per label; image i depends on (seed, i, its label) alone.

    A collective call: every rank draws its share, and every rank gets all images. All ranks call
    the model equally often with equally many images, so its weights may be spread over them.

    Args:
        model: Velocity model.
        flow: The flow it was trained with.
        config: Solver, steps and guidance.
        shape: What to draw, before it is decoded.
        codec: Makes images of it, ``batch`` at a time.
        labels: Requested classes, shape [n].
        seed: Seed of the noise.
        batch: Images in one network call on one rank when all scales are active.
        device: Where the model is.
        first_image: Index i of the first image, to draw many in parts.

    Returns:
        All images on every rank's host, shape [n, c, h, w], in [-1, 1] or slightly beyond, with
        the network evaluations counted over all ranks.

    Raises:
        SamplerConfigError: ``batch`` is below 1.
    """
    spread = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    share = -(-len(labels) // world)
    first, last = rank * share, (rank + 1) * share
    # What is drawn beyond the last label, for ranks to keep step, is thrown away.
    padded = torch.nn.functional.pad(labels, (0, world * share - len(labels)))
    noise_size = flow.noise_size(channels=shape.channels, image_size=shape.size)
    pixels = shape.size * codec.factor
    parts = [torch.zeros(0, codec.image_channels(shape.channels), pixels, pixels)]
    evaluations = torch.zeros(flow.stages.scales, dtype=torch.float64)
    at_once = images_per_call(flow.stages.scales, finest_batch=batch)[0]
    for start in range(first, last, at_once):
        count = min(at_once, last - start)
        drawn = sample(
            model,
            flow=flow,
            config=config,
            noise=rng.normals(
                seed,
                "samples",
                first=first_image + start,
                count=count,
                size=noise_size,
                device=device,
            ),
            labels=padded[start : start + count].to(device),
            channels=shape.channels,
            image_size=shape.size,
            null_label=shape.classes,
            finest_batch=batch,
        )
        parts += [codec.decode(some).cpu() for some in torch.split(drawn.images, batch)]
        wanted = min(max(len(labels) - start, 0), count)
        evaluations += wanted * torch.tensor(drawn.evaluations, dtype=torch.float64)
    mine = torch.cat(parts)
    if spread:
        mine = _gathered(mine, total=len(labels), device=device)
        evaluations = _summed(evaluations, device=device)
    return Samples(images=mine, evaluations=tuple((evaluations / len(labels)).tolist()))


def _gathered(mine: Tensor, *, total: int, device: torch.device) -> Tensor:
    moved = mine.to(device)
    everyone = [torch.empty_like(moved) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, moved)
    return torch.cat(everyone)[:total].cpu()


def _summed(counts: Tensor, *, device: torch.device) -> Tensor:
    moved = counts.to(device)
    dist.all_reduce(moved)
    return moved.cpu()
