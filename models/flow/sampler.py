"""Sampling: integrate the flow segment by segment, coarse scales first."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel
from models.flow.flow import Flow
from models.flow.guidance import guided
from models.flow.solver import SOLVERS, evaluation_times, integrate
from models.flow.stages import Stages
from models.pyramid import merge


class SamplerConfigError(ValueError):
    """Sampler settings that cannot be carried out."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to draw samples.

    Attributes:
        solver: Fixed-step method.
        steps: Steps over the whole time axis, spread over the segments by their length.
        guidance_scale: Classifier-free guidance scale; 1 is no guidance.
        guidance_interval: First and last time at which guidance acts; None means always.

    Raises:
        SamplerConfigError: A value is out of range or unknown.
    """

    solver: Literal["euler", "midpoint", "heun"] = "heun"
    steps: int = 40
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise SamplerConfigError(
                f"solver={self.solver!r} is unknown; use one of {sorted(SOLVERS)}."
            )
        if self.steps < 1:
            raise SamplerConfigError(f"steps={self.steps} must be at least 1.")
        if self.guidance_scale < 0:
            raise SamplerConfigError(
                f"guidance_scale={self.guidance_scale} must not be negative; 1 is no guidance."
            )
        interval = self.guidance_interval
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise SamplerConfigError(
                f"guidance_interval={interval} must be two times with 0 <= first <= last <= 1."
            )

    def guides_at(self, time: float) -> bool:
        """Whether guidance acts at ``time``."""
        first, last = self.guidance_interval or (0.0, 1.0)
        return self.guidance_scale != 1 and first <= time <= last


def steps_per_segment(stages: Stages, *, steps: int) -> tuple[int, ...]:
    """Spread ``steps`` over the segments in proportion to length, at least one for each.

    Raises:
        SamplerConfigError: There are fewer steps than segments.
    """
    segments = stages.segments
    if steps < len(segments):
        raise SamplerConfigError(
            f"steps={steps} is too few: each of the {len(segments)} segments needs at least one."
        )
    ideal = [(segment.end - segment.start) * steps for segment in segments]
    counts = [1] * len(segments)
    for _ in range(steps - len(segments)):
        behind = [want - have for want, have in zip(ideal, counts, strict=True)]
        counts[behind.index(max(behind))] += 1
    return tuple(counts)


def network_evaluations(config: SamplerConfig, flow: Flow) -> int:
    """Count the network evaluations of one sample; a guided pair counts as two.

    Raises:
        SamplerConfigError: There are fewer steps than segments.
    """
    counts = steps_per_segment(flow.stages, steps=config.steps)
    return sum(
        2 if config.guides_at(time) else 1
        for segment, steps in zip(flow.stages.segments, counts, strict=True)
        for times in evaluation_times(
            SOLVERS[config.solver], start=segment.start, end=segment.end, steps=steps
        )
        for time in times
    )


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
) -> Float[Tensor, "b c h w"]:
    """Turn noise into images; the same noise and labels give the same images.

    Args:
        velocity_model: The network.
        flow: The flow it was trained with.
        config: Solver, steps and guidance.
        noise: ``Flow.noise_size`` standard normal numbers for each image.
        labels: Class of each image.
        channels: Channels of the images.
        image_size: Height and width of the images.
        null_label: Label that stands for "no class"; used by guidance.

    Raises:
        SamplerConfigError: There are fewer steps than segments.
        FlowConfigError: ``noise`` holds another count of numbers.
    """
    guided_model = guided(velocity_model, scale=config.guidance_scale, null_label=null_label)

    def velocity(states: Bands, time: float) -> Bands:
        model = guided_model if config.guides_at(time) else velocity_model
        return model(states, noise.new_full((noise.shape[0],), time), labels)

    noise_bands = flow.noise_bands(noise, channels=channels, image_size=image_size)
    states: Bands = ()
    counts = steps_per_segment(flow.stages, steps=config.steps)
    for segment, steps in zip(flow.stages.segments, counts, strict=True):
        entering = flow.path.entry(noise_bands[segment.active - 1], segment.start)
        states = integrate(
            velocity,
            (*states, entering),
            start=segment.start,
            end=segment.end,
            steps=steps,
            solver=SOLVERS[config.solver],
        )
    return merge(states)
