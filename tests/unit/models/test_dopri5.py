import math

import pytest
import torch
from torchdiffeq import odeint

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import SolverError, integrate_adaptive, sample
from models.flow.sampler_config import SamplerConfig
from models.flow.solver import VelocityFunction

TOLERANCES = {"absolute_tolerance": 1e-5, "relative_tolerance": 1e-5}


def test_with_one_scale_it_is_torchdiffeq_from_noise_to_data() -> None:
    flow = Flow(FlowConfig(scales=1))
    noise = torch.randn(1, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        (state,) = states
        waves = torch.sin(labels * time)[:, None, None, None]
        return (torch.tanh(2 * state.roll(1, dims=3)) + waves - state,)

    labels = torch.tensor([3])
    drawn = sample(
        model,
        flow=flow,
        config=SamplerConfig(solver="dopri5"),
        noise=noise,
        labels=labels,
        channels=2,
        image_size=16,
        null_label=5,
    )

    def slope(time: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return model((state,), time.expand(1), labels)[0]

    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    state = noise.reshape(1, 2, 16, 16)
    with torch.no_grad():
        options = {"step_t": times[1:], "first_step": 0.05}
        same = odeint(slope, state, times, atol=1e-5, rtol=1e-5, options=options)
        # By default the last step overshoots and the end is interpolated.
        default = odeint(slope, state, times, atol=1e-5, rtol=1e-5)
    assert torch.equal(drawn.images, same[-1])
    torch.testing.assert_close(drawn.images, default[-1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(drawn.images, default[-1])


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_error_follows_the_tolerance(tolerance: float) -> None:
    """On y' = cos(t) (1 + y^2) beside w' = 10 cos(10 t): y = tan(sin t), w = sin 10 t."""

    def slope(states: Bands, time: float) -> Bands:
        y, w = states
        return math.cos(time) * (1 + y * y), torch.full_like(w, 10 * math.cos(10 * time))

    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    y, w = integrate_adaptive(
        slope,
        (zero, zero),
        start=0.0,
        end=1.0,
        absolute_tolerance=tolerance,
        relative_tolerance=tolerance,
    )
    assert y.item() == pytest.approx(math.tan(math.sin(1)), abs=20 * tolerance)
    assert w.item() == pytest.approx(math.sin(10), abs=20 * tolerance)


@pytest.mark.parametrize("strength", [30.0, 1.0, 1e-3, 0.0])
def test_nothing_is_evaluated_beyond_the_end(strength: float) -> None:
    times = []

    def slope(states: Bands, time: float) -> Bands:
        times.append(time)
        return tuple(-strength * state for state in states)

    start = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    (end,) = integrate_adaptive(slope, (start,), start=0.25, end=0.75, **TOLERANCES)
    assert min(times) == 0.25
    assert 0.74 < max(times) <= 0.75
    torch.testing.assert_close(end, math.exp(-0.5 * strength) * start, rtol=1e-4, atol=1e-5)


def stiff(states: Bands, time: float) -> Bands:
    return tuple(-1e7 * state for state in states)


def never_finite(states: Bands, time: float) -> Bands:
    return tuple(torch.full_like(state, math.nan) for state in states)


def jumping(states: Bands, time: float) -> Bands:
    """However short a step, its ends differ."""
    return tuple(1e30 * torch.rand(state.shape) for state in states)


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (stiff, "25 steps do not suffice; raise the tolerances"),
        (never_finite, "the velocity is not finite; look at the loss"),
        (jumping, "no step is short enough; raise the tolerances"),
    ],
)
def test_a_solver_that_comes_to_no_end_says_why(
    monkeypatch: pytest.MonkeyPatch, slope: VelocityFunction, words: str
) -> None:
    monkeypatch.setattr("models.flow.sampler.MAX_STEPS", 500 if slope is jumping else 25)
    start = torch.ones(2, 1, 2, 2)
    with pytest.raises(SolverError, match=rf"1e-05 .* stops at time 0\.2\d+, where {words}"):
        integrate_adaptive(slope, (start,), start=0.25, end=0.75, **TOLERANCES)
