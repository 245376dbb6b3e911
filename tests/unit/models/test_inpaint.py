"""Filling in: what is known stays, and what is missing follows it."""

from collections.abc import Callable

import pytest
import torch

from models.axes import Bands
from models.flow.flow import Flow, FlowConfig
from models.flow.inpaint import InpaintError, inpaint
from models.flow.sampler import Samples, sample
from models.flow.sampler_config import SamplerConfig, network_evaluations
from models.flow.solver import SOLVERS
from models.pyramid import split
from tests.unit.models.gaussian import Gaussian, OptimalVelocity

SIZE = 8
LABELS = torch.tensor([0, 1, 2])


def mild(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
    """A velocity that knows nothing of any data, couples all states, and is smooth in time."""
    coarse = states[0].mean(dim=(2, 3), keepdim=True)
    waves = torch.sin(3 * time + labels)[:, None, None, None]
    return tuple(torch.tanh(state.roll(1, dims=3)) + waves * (coarse - state) for state in states)


def draws(flow: Flow, *, images: int, channels: int, size: int) -> Callable[[int], torch.Tensor]:
    count = flow.noise_size(channels=channels, image_size=size)

    def noise(draw: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + draw)
        return torch.randn(images, count, generator=generator, dtype=torch.float64)

    return noise


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 2, SIZE, SIZE, generator=generator, dtype=torch.float64)


def filled(
    flow: Flow, known: torch.Tensor, *, repeats: int = 1, images=None, model=mild, **config: object
) -> Samples:
    return inpaint(
        model,
        flow=flow,
        config=SamplerConfig(**{"steps": 8, **config}),
        images=pictures() if images is None else images,
        known=known,
        noise=draws(flow, images=3, channels=2, size=SIZE),
        labels=LABELS,
        null_label=3,
        repeats=repeats,
    )


@pytest.mark.parametrize("noise", ["banded", "independent"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_a_known_image_moves_along_the_path_of_its_noise_whatever_the_model(
    scales: int, solver: str, noise: str
) -> None:
    flow = Flow(FlowConfig(scales=scales, noise=noise))
    bands = split(pictures(), scales)
    first = draws(flow, images=3, channels=2, size=SIZE)(0)
    eps = flow.noise_bands(first, channels=2, image_size=SIZE)

    def watched(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        for p, state in enumerate(states):
            tau = flow.stages.activation_times[p]
            point = flow.path.state(bands[p], eps[p], time, tau)
            torch.testing.assert_close(state, point, rtol=0, atol=1e-9)
        return mild(states, time, labels)

    everything = torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool)
    drawn = filled(flow, everything, model=watched, solver=solver)
    assert torch.equal(drawn.images, pictures())


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_with_nothing_known_it_is_sampling_to_the_bit(scales: int, solver: str, path: str) -> None:
    flow = Flow(FlowConfig(scales=scales, path=path))
    settings = {"solver": solver, "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}
    nothing = torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool)
    drawn = filled(flow, nothing, images=torch.full_like(pictures(), torch.nan), **settings)
    plain = sample(
        mild,
        flow=flow,
        config=SamplerConfig(steps=8, **settings),
        noise=draws(flow, images=3, channels=2, size=SIZE)(0),
        labels=LABELS,
        channels=2,
        image_size=SIZE,
        null_label=3,
    )
    assert torch.equal(drawn.images, plain.images)
    assert drawn.evaluations == plain.evaluations


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("scales", [1, 3])
def test_known_pixels_are_kept_and_the_missing_ones_may_hold_anything(
    scales: int, path: str, repeats: int
) -> None:
    flow = Flow(FlowConfig(scales=scales, path=path))
    generator = torch.Generator().manual_seed(3)
    known = torch.rand(3, 1, SIZE, SIZE, generator=generator) < 0.5
    results = []
    for rubbish in (torch.nan, 1e6):
        images = torch.where(known, pictures(), rubbish)
        drawn = filled(flow, known, images=images, repeats=repeats).images
        assert torch.equal(drawn[known.expand_as(drawn)], pictures()[known.expand_as(drawn)])
        assert drawn.isfinite().all()
        results.append(drawn)
    assert torch.equal(*results)


@pytest.mark.parametrize("repeats", [1, 4])
def test_repeats_cost_what_they_say(repeats: int) -> None:
    flow = Flow(FlowConfig(scales=2))
    known = torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool).tril()
    settings = {"solver": "heun", "guidance_scale": 2.0}
    once = network_evaluations(SamplerConfig(steps=8, **settings), flow)
    drawn = filled(flow, known, repeats=repeats, **settings)
    assert drawn.evaluations == tuple(repeats * count for count in once)


def smooth_images(size: int) -> Gaussian:
    """Images whose pixels are alike when they are near each other."""
    axis = torch.arange(size)
    places = torch.cartesian_prod(axis, axis).double()
    near = torch.exp(-torch.cdist(places, places).square() / 8)
    noise = 0.02 * torch.eye(size**2, dtype=torch.float64)
    return Gaussian(mean=torch.linspace(-1, 1, size**2).double(), covariance=near + noise)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Correlation of deviations from the mean over images."""
    centred = [(values - values.mean(0)).flatten() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(centred))[0, 1])


@pytest.mark.parametrize("missing", ["last row", "every other"])
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_what_is_missing_follows_what_is_known(scales: int, missing: str) -> None:
    """On Gaussian images, where the right answer is known: mean and spread given the known pixels.

    The last row is half of every block it touches, so a coarse band is never known there.
    """
    size, count = 4, 300
    config = FlowConfig(scales=scales)
    flow, data = Flow(config), smooth_images(size)
    generator = torch.Generator().manual_seed(scales)
    images = data.draw(count, generator)
    known = torch.ones(count, 1, size, size, dtype=torch.bool)
    if missing == "last row":
        known[..., -1, :] = False
    else:
        known[..., ::2, ::2] = known[..., 1::2, 1::2] = False
    k = known[0].flatten()
    gain = data.covariance[~k][:, k] @ torch.linalg.inv(data.covariance[k][:, k])
    right_mean = data.mean[~k] + (images.flatten(1)[:, k] - data.mean[k]) @ gain.T
    right_spread = data.covariance[~k][:, ~k] - gain @ data.covariance[k][:, ~k]
    root = torch.linalg.cholesky(right_spread)
    right = right_mean + torch.randn(right_mean.shape, generator=generator).double() @ root.T

    def drawn(repeats: int, known: torch.Tensor) -> torch.Tensor:
        filled_in = inpaint(
            OptimalVelocity(data, config, sees="full"),
            flow=flow,
            config=SamplerConfig(steps=20),
            images=images,
            known=known,
            noise=draws(flow, images=count, channels=1, size=size),
            labels=torch.zeros(count, dtype=torch.long),
            null_label=0,
            repeats=repeats,
        ).images
        return filled_in.flatten(1)[:, ~k]

    def surprise(pixels: torch.Tensor) -> float:
        """Squared deviation from the right mean in units of the right spread; 1 is right."""
        deviation = pixels - right_mean
        return float((deviation @ torch.linalg.inv(right_spread) * deviation).mean())

    chance, once, often = drawn(1, torch.zeros_like(known)), drawn(1, known), drawn(8, known)
    best = correlation(right, right_mean)
    assert abs(correlation(chance, right_mean)) < 0.15
    assert correlation(once, right_mean) > 0.4
    assert correlation(often, right_mean) > 0.9 * best
    assert surprise(right) == pytest.approx(1, abs=0.15)
    assert surprise(once) < surprise(chance) / 2
    assert surprise(often) < 1.7


@pytest.mark.usefixtures("without_type_checks")
def test_requests_that_cannot_be_carried_out_are_refused() -> None:
    flow, known = Flow(FlowConfig(scales=2)), torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool)
    with pytest.raises(InpaintError, match="dopri5 cannot fill in"):
        filled(flow, known, solver="dopri5")
    with pytest.raises(InpaintError, match="repeats=0"):
        filled(flow, known, repeats=0)
    with pytest.raises(InpaintError, match=r"\(3, 1, 4, 8\) does not fit .*\(3, 2, 8, 8\)"):
        filled(flow, known[:, :, :4])
