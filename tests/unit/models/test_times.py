import math

import pytest
import torch

from models.flow.config import FlowConfig
from models.flow.flow import Flow, logit_normal, uniform

GRID = (torch.arange(60_000, dtype=torch.float64) + 0.5) / 60_000


def test_uniform_fills_the_stage_evenly() -> None:
    times = uniform(GRID, 0.4)
    torch.testing.assert_close(times, 0.4 + 0.6 * GRID)


def test_logit_normal_has_a_normal_logit() -> None:
    place = (logit_normal(GRID, 0.4) - 0.4) / 0.6
    logit = torch.log(place / (1 - place))
    cumulative = 0.5 * (1 + torch.erf(logit / math.sqrt(2)))
    torch.testing.assert_close(cumulative, GRID, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler", [uniform, logit_normal])
def test_times_stay_inside_the_stage(sampler) -> None:
    extremes = torch.tensor([0.0, torch.finfo(torch.float32).eps, 1 - 2**-24])
    for tau in (0.0, 0.33, 0.67, 0.999):
        times = sampler(extremes, tau)
        assert torch.isfinite(times).all()
        assert (times >= tau).all()
        assert (times <= 1).all()
        assert (times.diff() >= 0).all()


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_density_of_the_training_times(scales: int) -> None:
    """A uniform stage and a uniform time in it: density at t is mean over s of 1/(1 - tau_s)."""
    flow = Flow(FlowConfig(scales=scales))
    activations = flow.stages.activation_times
    times = torch.cat([flow.time_sampler(GRID, tau) for tau in activations])
    for segment in flow.stages.segments:
        inside = ((times >= segment.start) & (times < segment.end)).double().mean()
        open_stages = activations[: segment.active]
        density = sum(1 / (1 - tau) for tau in open_stages) / scales
        assert inside.item() == pytest.approx(density * (segment.end - segment.start), abs=1e-4)
