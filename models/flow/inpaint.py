"""Inpainting with a trained model: sample what is missing of an image (the paper's future work).

The velocity of every active scale tells how the model sees the clean image at that moment. Before
it is followed, what is known of the image is put into that view, which bends the velocity toward
it (for diffusion: Wang, Yu and Zhang 2023, "Denoising Diffusion Null-Space Model"). Known pixels
then move straight along the path of their own noise, band by band, and end as they are.

The network still sees known pixels under one draw of noise, and follows them too little. So every
step may be repeated from fresh noise, which lets what is missing come to terms with what is known
(Lugmayr et al. 2022, "RePaint").
"""

import math
from collections.abc import Callable
from itertools import count

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.axes import Band, Bands, VelocityModel
from models.flow.flow import Flow
from models.flow.path import Coefficients
from models.flow.sampler import NfeCounter, Samples, guide
from models.flow.sampler_config import Piece, SamplerConfig
from models.flow.solver import VelocityFunction, integrate
from models.flow.tableaus import SOLVERS
from models.pyramid import down, merge, split, up

NoiseSource = Callable[[int], Float[Tensor, "b n"]]
"""``draw -> noise``: independent draws of ``Flow.noise_size`` normal numbers for each image."""

# At the end of time there is no noise left to weigh what is missing against.
_MIN_SIGMA = 1e-3


class InpaintError(ValueError):
    """A request to fill in that cannot be carried out."""


@torch.no_grad()
def inpaint(
    velocity_model: VelocityModel,
    *,
    flow: Flow,
    config: SamplerConfig,
    images: Float[Tensor, "b c h w"],
    known: Bool[Tensor, "b 1 h w"],
    noise: NoiseSource,
    labels: Int[Tensor, "b"],
    null_label: int,
    repeats: int,
) -> Samples:
    """Sample the pixels that are not known; the known ones are kept exactly.

    With nothing known and no repeats it is ``sample`` of the first draw of noise, to the bit.

    Args:
        velocity_model: The network.
        flow: The flow it was trained with.
        config: Solver with fixed steps, and guidance.
        images: Images; what they hold where they are not known does not matter.
        known: Pixels to keep.
        noise: The noise; draw 0 begins, the others serve the repeats.
        labels: Class of each image.
        null_label: Label that stands for "no class"; used by guidance.
        repeats: How often each step is made; 1 goes straight on. More follow the known part more
            closely, at as many times the cost.

    Raises:
        InpaintError: The solver chooses its own steps, ``repeats`` is below 1, or images and mask
            differ in size.
        PyramidError: The image size does not fit the number of scales.
        StepsError: There are fewer steps than segments.
    """
    _check(config, images=images, known=known, repeats=repeats)
    fresh_noise = _FreshNoise(flow, noise, images)
    solver, counter = SOLVERS[config.solver], NfeCounter(velocity_model)
    guided_model = guide(counter, scale=config.guidance_scale, null_label=null_label)
    noise_bands = fresh_noise.take()
    states: Bands = ()
    nfe = []
    for segment, pieces in zip(flow.stages.segments, config.plan(flow.stages), strict=True):
        states = (*states, flow.path.entry(noise_bands[segment.active - 1], segment.start))
        for piece in pieces:
            model = guided_model if piece.guided else counter
            velocity = _bend_toward_known(
                model, flow=flow, images=images, known=known, labels=labels
            )
            for start, end, steps in _strides(piece, single=repeats > 1):
                for repeat in range(repeats):
                    if repeat:
                        states = _renoise(flow, states, fresh_noise.take(), start=start, end=end)
                    states = integrate(
                        velocity, states, start=start, end=end, steps=steps, solver=solver
                    )
        nfe.append(counter.take() / images.shape[0])
    drawn = torch.where(known, images, merge(states))
    return Samples(images=drawn, nfe=tuple(nfe))


class _FreshNoise:
    """The noise of every scale, from one draw after the other."""

    def __init__(self, flow: Flow, noise: NoiseSource, images: Float[Tensor, "b c h w"]) -> None:
        self._flow = flow
        self._noise = noise
        self._shape = {"channels": images.shape[1], "image_size": images.shape[-1]}
        self._draws = count()

    def take(self) -> Bands:
        """Return the bands of the next draw, beginning with draw 0."""
        return self._flow.noise_bands(self._noise(next(self._draws)), **self._shape)


def _bend_toward_known(
    model: VelocityModel,
    *,
    flow: Flow,
    images: Float[Tensor, "b c h w"],
    known: Bool[Tensor, "b 1 h w"],
    labels: Int[Tensor, "b"],
) -> VelocityFunction:
    """Bend a velocity so that the clean image it heads for agrees with the known pixels."""

    def velocity(states: Bands, time: float) -> Bands:
        seen = model(states, states[0].new_full((images.shape[0],), time), labels)
        at = [
            flow.path.coefficients(time, tau) for tau in flow.stages.activation_times[: len(states)]
        ]
        clean = tuple(_data(state, v, c) for state, v, c in zip(states, seen, at, strict=True))
        return tuple(
            v + _determinant(c) / max(c.sigma, _MIN_SIGMA) * change
            for v, c, change in zip(seen, at, _changes(clean, images, known), strict=True)
        )

    return velocity


def _determinant(c: Coefficients) -> float:
    """Determinant of the map from data and noise to state and velocity, up to its sign."""
    return c.alpha_rate * c.sigma - c.sigma_rate * c.alpha


def _data(state: Band, velocity: Band, c: Coefficients) -> Band:
    """The data of a path that has this state and velocity."""
    return (c.sigma * velocity - c.sigma_rate * state) / _determinant(c)


def _changes(
    clean: Bands, images: Float[Tensor, "b c h w"], known: Bool[Tensor, "b 1 h w"]
) -> Bands:
    """What to add to the bands of a clean image so that its known pixels become right.

    A coarse element moves by the mean error of its block, to which unknown pixels add nothing: it
    becomes right when the whole block is known, and in proportion when a part is. In the same
    proportion the bands of a model, whose residuals need not sum to zero over a block, are
    replaced by those of the image they add up to.
    """
    picture = merge(clean)
    halvings = (images.shape[-1] // picture.shape[-1]).bit_length() - 1
    share = known.to(picture.dtype)
    large = picture
    for _ in range(halvings):
        large = up(large)
    error = torch.where(known, images - large, 0.0)
    for _ in range(halvings):
        error, share = down(error), down(share)
    changes = zip(clean, split(error, len(clean)), split(picture, len(clean)), strict=True)
    return tuple(
        change + part * (proper - band)
        for part, (band, change, proper) in zip(_shares(share, len(clean)), changes, strict=True)
    )


def _shares(share: Float[Tensor, "b 1 g g"], scales: int) -> Bands:
    """Share of known pixels behind each element of each band, coarse to fine."""
    residuals: list[Tensor] = []
    for _ in range(scales - 1):
        share = down(share)
        residuals.append(up(share))
    return (share, *reversed(residuals))


def _renoise(flow: Flow, states: Bands, fresh: Bands, *, start: float, end: float) -> Bands:
    """Take states at ``end`` back to ``start`` by adding noise, as the path would have them."""
    back = []
    for state, eps, tau in zip(states, fresh, flow.stages.activation_times, strict=False):
        before, after = (flow.path.coefficients(time, tau) for time in (start, end))
        kept = before.alpha / after.alpha
        added = math.sqrt(max(0.0, before.sigma**2 - (kept * after.sigma) ** 2))
        back.append(kept * state + added * eps)
    return tuple(back)


def _strides(piece: Piece, *, single: bool) -> list[tuple[float, float, int]]:
    """Start, end and steps of each part of a piece that is integrated at once."""
    if not single:
        return [(piece.start, piece.end, piece.steps)]
    length = piece.end - piece.start
    edges = [piece.start + length * (step / piece.steps) for step in range(piece.steps)]
    return [(start, end, 1) for start, end in zip(edges, [*edges[1:], piece.end], strict=True)]


def _check(
    config: SamplerConfig,
    *,
    images: Float[Tensor, "b c h w"],
    known: Bool[Tensor, "b 1 h w"],
    repeats: int,
) -> None:
    if config.adaptive:
        raise InpaintError(
            f"solver={config.solver} cannot fill in images: its steps are its own, and cannot be "
            f"repeated. Use one of {sorted(SOLVERS)}."
        )
    if repeats < 1:
        raise InpaintError(f"repeats={repeats} must be at least 1.")
    expected = (images.shape[0], 1, *images.shape[2:])
    if tuple(known.shape) != expected:
        raise InpaintError(
            f"a mask of shape {tuple(known.shape)} does not fit images of shape "
            f"{tuple(images.shape)}; it must be {expected}."
        )
