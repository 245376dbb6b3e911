"""The path of every band, and the segmented sampler that follows it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.path import GvpPath, LinearPath, Path
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig
from models.flow.tableaus import SOLVERS
from models.pyramid import split

QUICK = settings(max_examples=40, deadline=None)
PATHS = st.sampled_from([LinearPath(), GvpPath()])
ACTIVATIONS = st.floats(0, 0.95)
SEEDS = st.integers(0, 2**32)


def draw_pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


@st.composite
def critical_times(draw: st.DrawFn, scales: int) -> tuple[float, ...]:
    """Falling times, no two of which are closer than 0.01."""
    count = scales - 1
    hundredths = draw(st.lists(st.integers(1, 99), min_size=count, max_size=count, unique=True))
    return tuple(h / 100 for h in sorted(hundredths, reverse=True))


@QUICK
@given(ACTIVATIONS, SEEDS)
def test_a_linear_scale_enters_as_shrunk_noise_and_ends_as_data(tau: float, seed: int) -> None:
    data, noise = draw_pair(seed, 3, 2, 4, 4)
    path = LinearPath()
    end = torch.ones(3, dtype=torch.float64)
    begin = torch.full_like(end, tau)
    torch.testing.assert_close(path.state(data, noise, begin, tau), (1 - tau) * noise)
    torch.testing.assert_close(path.entry(noise, tau), (1 - tau) * noise)
    torch.testing.assert_close(path.state(data, noise, end, tau), data)


@QUICK
@given(ACTIVATIONS, SEEDS)
def test_a_gvp_scale_enters_as_shrunk_noise_and_ends_as_data(tau: float, seed: int) -> None:
    data, noise = draw_pair(seed, 3, 2, 4, 4)
    path = GvpPath()
    end = torch.ones(3, dtype=torch.float64)
    shrunk = math.cos(math.pi * tau / 2) * noise
    torch.testing.assert_close(path.state(data, noise, torch.full_like(end, tau), tau), shrunk)
    torch.testing.assert_close(path.entry(noise, tau), shrunk)
    torch.testing.assert_close(path.state(data, noise, end, tau), data)


@QUICK
@given(PATHS, ACTIVATIONS, st.floats(0.01, 0.99), SEEDS)
def test_velocity_is_the_finite_difference_of_the_path(
    path: Path, tau: float, place: float, seed: int
) -> None:
    data, noise = draw_pair(seed, 2, 1, 4, 4)
    time = torch.full((2,), tau + (1 - tau) * place, dtype=torch.float64)
    step = 1e-5 * (1 - tau)
    after = path.state(data, noise, time + step, tau)
    before = path.state(data, noise, time - step, tau)
    torch.testing.assert_close(
        path.velocity(data, noise, time, tau), (after - before) / (2 * step), rtol=1e-7, atol=1e-7
    )


@QUICK
@given(PATHS, ACTIVATIONS, st.floats(0, 1), SEEDS)
def test_coefficients_are_those_of_state_and_velocity(
    path: Path, tau: float, place: float, seed: int
) -> None:
    data, noise = draw_pair(seed, 2, 1, 4, 4)
    time = tau + (1 - tau) * place
    c = path.coefficients(time, tau)
    times = torch.full((2,), time, dtype=torch.float64)
    torch.testing.assert_close(
        c.alpha * data + c.sigma * noise, path.state(data, noise, times, tau)
    )
    torch.testing.assert_close(
        c.alpha_rate * data + c.sigma_rate * noise, path.velocity(data, noise, times, tau)
    )


@QUICK
@given(PATHS, ACTIVATIONS, SEEDS)
def test_each_image_has_its_own_time(path: Path, tau: float, seed: int) -> None:
    data, noise = draw_pair(seed, 3, 1, 2, 2)
    times = torch.tensor([tau, (1 + tau) / 2, 1.0], dtype=torch.float64)
    together = path.state(data, noise, times, tau), path.velocity(data, noise, times, tau)
    for i in range(3):
        own = (data[i : i + 1], noise[i : i + 1], times[i : i + 1], tau)
        torch.testing.assert_close(together[0][i : i + 1], path.state(*own))
        torch.testing.assert_close(together[1][i : i + 1], path.velocity(*own))


@pytest.mark.parametrize("solver", [*SOLVERS, "dopri5"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@settings(max_examples=5, deadline=None)
@given(st.data(), st.sampled_from(["banded", "independent"]), st.integers(4, 9), SEEDS)
def test_exact_velocities_lead_from_the_noise_to_the_image(
    scales: int, solver: str, data: st.DataObject, noise_kind: str, steps: int, seed: int
) -> None:
    """And every state on the way, the first of each scale included, lies on the path."""
    times = data.draw(critical_times(scales))
    flow = Flow(FlowConfig(scales=scales, critical_times=times, noise=noise_kind))
    count = flow.noise_size(channels=2, image_size=8)
    image, _ = draw_pair(seed, 2, 2, 8, 8)
    noise, _ = draw_pair(seed + 1, 2, count)
    bands = split(image, scales)
    eps = flow.noise_bands(noise, channels=2, image_size=8)
    taus = flow.stages.activation_times

    def exact(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        del labels
        on_path = [(bands[p], eps[p], time, taus[p]) for p in range(len(states))]
        for state, point in zip(states, on_path, strict=True):
            torch.testing.assert_close(state, flow.path.state(*point), rtol=0, atol=1e-10)
        return tuple(flow.path.velocity(*point) for point in on_path)

    drawn = sample(
        exact,
        flow=flow,
        config=SamplerConfig(solver=solver, steps=steps, adaptive_group=2),
        noise=noise,
        labels=torch.zeros(2, dtype=torch.long),
        channels=2,
        image_size=8,
        null_label=0,
    )
    torch.testing.assert_close(drawn.images, image, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise_kind", ["banded", "independent"])
@pytest.mark.parametrize("solver", [*SOLVERS, "dopri5"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_the_sampler_lets_a_scale_enter_as_its_shrunk_noise(
    scales: int, solver: str, noise_kind: str
) -> None:
    flow = Flow(FlowConfig(scales=scales, noise=noise_kind))
    noise, _ = draw_pair(6, 1, flow.noise_size(channels=2, image_size=8))
    bands = flow.noise_bands(noise, channels=2, image_size=8)
    entered: list[torch.Tensor] = []

    def still(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        del labels
        if len(states) > len(entered):
            assert time.item() == flow.stages.activation_times[len(entered)]
            entered.append(states[-1])
        return tuple(-state for state in states)

    sample(
        still,
        flow=flow,
        config=SamplerConfig(solver=solver, steps=4),
        noise=noise,
        labels=torch.zeros(1, dtype=torch.long),
        channels=2,
        image_size=8,
        null_label=0,
    )
    assert len(entered) == scales
    for state, band, tau in zip(entered, bands, flow.stages.activation_times, strict=True):
        assert torch.equal(state, (1 - tau) * band)


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_noise_bands_carry_the_whole_draw(scales: int) -> None:
    """Banded noise is one full-resolution draw: the pyramid of the noise adds up to it."""
    flow = Flow(FlowConfig(scales=scales))
    noise, _ = draw_pair(5, 3, 2 * 64)
    bands = flow.noise_bands(noise, channels=2, image_size=8)
    expected = split(noise.reshape(3, 2, 8, 8), scales)
    assert all(torch.equal(got, want) for got, want in zip(bands, expected, strict=True))
