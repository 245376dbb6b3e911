"""Samples drawn from a model, spread over ranks, the same whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.flow.flow import Flow
from models.flow.sampler import SamplerConfig, sample
from trainer import rng


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """Shape of one image or latent and the number of classes.

    Attributes:
        channels: Channels.
        size: Height and width in pixels.
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
    labels: Tensor,
    seed: int,
    batch: int,
    device: torch.device,
) -> Tensor:
    """Sample one image per label; image i depends on (seed, i, its label) alone.

    Args:
        model: Velocity model.
        flow: The flow it was trained with.
        config: Solver, steps and guidance.
        shape: What to draw.
        labels: Requested classes, shape [n].
        seed: Seed of the noise.
        batch: Images per solver run on one rank.
        device: Where the model is.

    Returns:
        All images on every rank's host, shape [n, c, h, w], in [-1, 1] or slightly beyond.
    """
    spread = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    share = -(-len(labels) // world)
    first, last = min(rank * share, len(labels)), min((rank + 1) * share, len(labels))
    noise_size = flow.noise_size(channels=shape.channels, image_size=shape.size)
    parts = []
    for start in range(first, last, batch):
        count = min(batch, last - start)
        parts.append(
            sample(
                model,
                flow=flow,
                config=config,
                noise=rng.normals(
                    seed, "samples", first=start, count=count, size=noise_size, device=device
                ),
                labels=labels[start : start + count].to(device),
                channels=shape.channels,
                image_size=shape.size,
                null_label=shape.classes,
            ).cpu()
        )
    empty = torch.zeros(0, shape.channels, shape.size, shape.size)
    mine = torch.cat(parts) if parts else empty
    return _gathered(mine, share=share, total=len(labels), device=device) if spread else mine


def _gathered(mine: Tensor, *, share: int, total: int, device: torch.device) -> Tensor:
    padded = torch.zeros(share, *mine.shape[1:], device=device)
    padded[: len(mine)] = mine.to(device)
    everyone = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, padded)
    return torch.cat(everyone)[:total].cpu()
