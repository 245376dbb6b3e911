"""Sampling: integrate the flow segment by segment, coarse scales first."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel
from models.flow.dopri5 import integrate_adaptive
from models.flow.flow import Flow
from models.flow.guidance import NfeCounter, guide
from models.flow.sampler_config import Piece, SamplerConfig, SamplerConfigError
from models.flow.solver import SOLVERS, integrate
from models.pyramid import merge


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples and what they took.

    Attributes:
        images: The images.
        nfe: Network evaluations for each image in each segment, counted as they were made
            and averaged over the images; a guided pair counts as two.
    """

    images: Float[Tensor, "b c h w"]
    nfe: tuple[float, ...]


def images_per_call(scales: int, *, finest_batch: int) -> tuple[int, ...]:
    """Images that one network call may hold in each segment, for a like number of tokens.

    Args:
        scales: Number of scales, K.
        finest_batch: Images in one call when all scales are active.

    Raises:
        SamplerConfigError: ``finest_batch`` is below 1.
    """
    if finest_batch < 1:
        raise SamplerConfigError(f"a batch of {finest_batch} images must have at least 1.")
    # With 1, 2, ... scales active an image has 1, 1 + 4, 1 + 4 + 16, ... times the coarsest tokens.
    tokens = [(4**active - 1) // 3 for active in range(1, scales + 1)]
    return tuple(finest_batch * tokens[-1] // count for count in tokens)


@torch.no_grad()
def sample(
    velocity_model: VelocityModel,
    *,
    flow: Flow,
    config: SamplerConfig,
    noise: Float[Tensor, "b n"],
    labels: Int[Tensor, "b"],
    channels: int,
    image_size: int,
    null_label: int,
    finest_batch: int | None = None,
) -> Samples:
    """Turn noise into images; an image depends on its own noise and label.

    Args:
        velocity_model: The network.
        flow: The flow it was trained with.
        config: Solver, steps and guidance.
        noise: ``Flow.noise_size`` standard normal numbers for each image.
        labels: Class of each image.
        channels: Channels of the images.
        image_size: Height and width of the images.
        null_label: Label that stands for "no class"; used by guidance.
        finest_batch: Images in one network call when all scales are active; segments with fewer
            tokens take more at once, see ``images_per_call``. None takes all images at once.

    Raises:
        StepsError: There are fewer steps than segments.
        SamplerConfigError: ``finest_batch`` is below 1.
        FlowConfigError: ``noise`` holds another count of numbers.
    """
    images, scales = noise.shape[0], flow.stages.scales
    counter = NfeCounter(velocity_model)
    guided_model = guide(counter, scale=config.guidance_scale, null_label=null_label)
    sizes = images_per_call(scales, finest_batch=images if finest_batch is None else finest_batch)
    if config.adaptive:
        sizes = (config.adaptive_group,) * scales

    noise_bands = flow.noise_bands(noise, channels=channels, image_size=image_size)
    states: Bands = ()
    nfe = []
    plan = zip(flow.stages.segments, config.plan(flow.stages), sizes, strict=True)
    for segment, pieces, size in plan:
        entering = flow.path.entry(noise_bands[segment.active - 1], segment.start)
        states = (*states, entering)
        parts = []
        for first in range(0, images, size):
            batch = slice(first, first + size)
            some = tuple(state[batch] for state in states)
            for piece in pieces:
                model = guided_model if piece.guided else counter
                some = _integrate(model, some, labels[batch], piece=piece, config=config)
            parts.append(some)
        states = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        nfe.append(counter.take() / images)
    return Samples(images=merge(states), nfe=tuple(nfe))


def _integrate(
    model: VelocityModel, states: Bands, labels: Tensor, *, piece: Piece, config: SamplerConfig
) -> Bands:
    """Bring states from the start of a piece to its end."""

    def velocity(current: Bands, time: float) -> Bands:
        return model(current, current[0].new_full((len(labels),), time), labels)

    if config.adaptive:
        return integrate_adaptive(
            velocity,
            states,
            start=piece.start,
            end=piece.end,
            absolute_tolerance=config.absolute_tolerance,
            relative_tolerance=config.relative_tolerance,
        )
    return integrate(
        velocity,
        states,
        start=piece.start,
        end=piece.end,
        steps=piece.steps,
        solver=SOLVERS[config.solver],
    )
