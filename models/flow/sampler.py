"""Sampling: integrate the flow segment by segment, coarse scales first."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel, to_images
from models.flow.flow import Flow
from models.flow.sampler_config import (
    MAX_STEPS,
    Piece,
    SamplerConfig,
    SamplerConfigError,
    check_shared,
)
from models.flow.solver import Observer, VelocityFunction, integrate, unobserved
from models.flow.tableaus import SOLVERS
from models.pyramid import merge

_FIRST_STEP = 0.05
"""Share of the interval that is tried first; a step that is too long is made again."""


class SolverError(ValueError):
    """A solver that chooses its own steps comes to no end with this network and tolerances."""


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
    share_coarse: int = 1,
    observe: Observer = unobserved,
) -> Samples:
    """Turn noise into images; an image depends on its own noise and label.

    With ``share_coarse`` so many images, one after the other, are variations of one layout: they
    have the first one's noise on all scales but the finest, and its label. What no finer scale
    changes, coarse states, keys and values, is computed once for all of them.

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
        share_coarse: How many images share their coarse scales; 1 shares nothing.
        observe: Called after each step, and where a scale has entered, with the images of a call.

    Raises:
        StepsError: There are fewer steps than segments.
        SamplerConfigError: ``finest_batch`` is below 1, or coarse scales cannot be shared.
        FlowConfigError: ``noise`` holds another count of numbers.
        SolverError: The solver chooses its own steps, and comes to no end.
    """
    images, scales = noise.shape[0], flow.stages.scales
    check_shared(share_coarse, stages=flow.stages, config=config, images=images)
    counter = NfeCounter(velocity_model)
    guided = guide(counter, scale=config.guidance_scale, null_label=null_label)
    advance = partial(_advance, counter, guided, config=config, observe=observe)
    sizes = images_per_call(scales, finest_batch=images if finest_batch is None else finest_batch)
    sizes = (config.adaptive_group,) * scales if config.adaptive else sizes
    noise_bands = flow.noise_bands(noise, channels=channels, image_size=image_size)
    # Of the images of a layout the first one stands for all, but on the finest scale.
    noise_bands = (*(band[::share_coarse] for band in noise_bands[:-1]), noise_bands[-1])
    labels = labels[::share_coarse]
    states: Bands = ()
    nfe = []
    plan = zip(flow.stages.segments, config.plan(flow.stages), sizes, strict=True)
    for segment, pieces, size in plan:
        states = (*states, flow.path.entry(noise_bands[segment.active - 1], segment.start))
        variations = share_coarse if segment.active == scales else 1
        states = advance(states, labels, pieces=pieces, size=size, variations=variations)
        nfe.append(counter.take() / images)
    return Samples(images=merge(tuple(to_images(s, images) for s in states)), nfe=tuple(nfe))


def _advance(
    model: VelocityModel,
    guided: VelocityModel,
    states: Bands,
    labels: Tensor,
    *,
    pieces: Sequence[Piece],
    size: int,
    variations: int,
    config: SamplerConfig,
    observe: Observer,
) -> Bands:
    """Bring states through a segment, so many images of the finest in a call.

    There is a label for each layout, and the finest state has so many variations of each.
    """
    layouts = max(1, size // variations)
    parts = []
    for first in range(0, len(labels), layouts):
        batch = slice(first, first + layouts)
        varied = slice(first * variations, (first + layouts) * variations)
        some = (*(state[batch] for state in states[:-1]), states[-1][varied])
        observe(pieces[0].start, some)
        for piece in pieces:
            some = _integrate(
                guided if piece.guided else model,
                some,
                labels[batch],
                piece=piece,
                config=config,
                observe=observe,
            )
        parts.append(some)
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _integrate(
    model: VelocityModel,
    states: Bands,
    labels: Tensor,
    *,
    piece: Piece,
    config: SamplerConfig,
    observe: Observer,
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
            observe=observe,
        )
    return integrate(
        velocity,
        states,
        start=piece.start,
        end=piece.end,
        steps=piece.steps,
        solver=SOLVERS[config.solver],
        observe=observe,
    )


def integrate_adaptive(
    velocity: VelocityFunction,
    states: Bands,
    *,
    start: float,
    end: float,
    absolute_tolerance: float,
    relative_tolerance: float,
    observe: Observer = unobserved,
) -> Bands:
    """Integrate d states / d time = velocity(states, time) with steps that follow the error.

    A step is taken when, on every scale, the root mean square of the estimated error over all
    images and elements, each divided by its tolerance, is at most 1. All images share the steps.

    Args:
        velocity: Right-hand side; smooth in time between ``start`` and ``end``.
        states: States at ``start``.
        start: First time.
        end: Last time.
        absolute_tolerance: Part of the tolerance that does not depend on the state.
        relative_tolerance: Part of the tolerance in proportion to the state's size.
        observe: Called after each step that was taken.

    Returns:
        The states at ``end``.

    Raises:
        SolverError: No step is short enough for the tolerances, or too many are needed.
    """
    # It imports scipy, for half a second.
    from torchdiffeq import odeint

    slope = _Slope(velocity, f"{absolute_tolerance=:g} and {relative_tolerance=:g}", observe)

    times = torch.tensor([start, end], dtype=torch.float64, device=states[0].device)
    trajectory = odeint(
        slope,
        states,
        times,
        atol=absolute_tolerance,
        rtol=relative_tolerance,
        method="dopri5",
        # Land on the end: by default the last step goes beyond, where nothing was trained, and the
        # result is interpolated. The first step is given, because its own choice looks beyond too.
        options={"step_t": times[1:], "first_step": (end - start) * _FIRST_STEP},
    )
    last = tuple(points[-1] for points in trajectory)
    observe(end, last)
    return last


class _Slope:
    """A right-hand side as torchdiffeq calls it, which sees to it that the steps come to an end.

    Args:
        velocity: The right-hand side.
        asked: The tolerances, for messages.
        observe: Sees where each step begins that follows on another.
    """

    def __init__(self, velocity: VelocityFunction, asked: str, observe: Observer) -> None:
        self._velocity = velocity
        self._asked = asked
        self._observe = observe
        self._seen: float | None = None
        self._steps = 0
        self._latest: Bands = ()

    def __call__(self, time: Tensor, current: Bands) -> Bands:
        self._latest = self._velocity(current, time.item())
        return self._latest

    def callback_step(self, time: Tensor, current: Bands, step: Tensor) -> None:
        """Look at a step before torchdiffeq tries it, perhaps again and shorter.

        Raises:
            SolverError: It is too short to get on, or one too many.
        """
        self._steps += 1
        moment = time.item()
        if self._seen is not None and moment > self._seen:
            self._observe(moment, current)
        self._seen = moment
        if time + step > time and self._steps <= MAX_STEPS:
            return
        many = self._steps > MAX_STEPS
        found = f"{MAX_STEPS} steps do not suffice" if many else "no step is short enough"
        advice = "raise the tolerances, or use a solver of fixed steps, such as heun"
        if not all(torch.isfinite(band).all() for band in self._latest):
            found, advice = "the velocity is not finite", "look at the loss, and at guidance_scale"
        raise SolverError(
            f"solver=dopri5 with {self._asked} stops at time {time.item():.4f}, where {found}; "
            f"{advice}."
        )


def guide(velocity_model: VelocityModel, *, scale: float, null_label: int) -> VelocityModel:
    """Wrap a velocity model so that it returns ``v_null + scale * (v_label - v_null)``.

    Both velocities come from one call on a batch of twice the size.

    Args:
        velocity_model: Network that was trained with some labels replaced by ``null_label``.
        scale: Guidance scale w; 1 leaves the velocity as it is.
        null_label: Label that stands for "no class".

    Returns:
        A velocity model for states that all hold the whole batch.
    """

    def velocity(states: Bands, time: Float[Tensor, "b"], labels: Int[Tensor, "b"]) -> Bands:
        doubled = tuple(torch.cat([state, state]) for state in states)
        pair_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        pairs = (v.chunk(2) for v in velocity_model(doubled, torch.cat([time, time]), pair_labels))
        return tuple(null + scale * (labelled - null) for labelled, null in pairs)

    return velocity


class NfeCounter:
    """A velocity model that counts the images it is called with; a guided pair counts as two.

    They are those of the finest state: coarse scales that images share count once.
    """

    def __init__(self, model: VelocityModel) -> None:
        self._model = model
        self._images = 0

    def __call__(self, states: Bands, time: Tensor, labels: Tensor) -> Bands:
        """Call the model."""
        self._images += states[-1].shape[0]
        return self._model(states, time, labels)

    def take(self) -> int:
        """Return the count and begin again at zero."""
        images, self._images = self._images, 0
        return images
