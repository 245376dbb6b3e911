import math

import pytest
import torch

from models.axes import Bands
from models.flow.flow import Flow, FlowConfig
from models.flow.guidance import guided
from models.flow.sampler import (
    SamplerConfig,
    SamplerConfigError,
    network_evaluations,
    sample,
    steps_per_segment,
)
from models.flow.solver import SOLVERS
from models.flow.stages import Stages
from models.pyramid import split
from tests.unit.models.reference import tiny_model, tiny_states

NULL = 5


def noise_for(flow: Flow, *, images: int) -> torch.Tensor:
    count = flow.noise_size(channels=2, image_size=16)
    return torch.randn(
        images, count, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )


def draw(model, config: SamplerConfig, flow: Flow, noise: torch.Tensor, labels: torch.Tensor):
    return sample(
        model,
        flow=flow,
        config=config,
        noise=noise,
        labels=labels,
        channels=2,
        image_size=16,
        null_label=NULL,
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scales", [1, 3])
def test_curved_paths_converge_at_the_solvers_order(solver: str, scales: int) -> None:
    flow = Flow(FlowConfig(scales=scales, path="gvp"))
    noise = noise_for(flow, images=2)
    image = torch.linspace(-1, 1, 2 * 2 * 256, dtype=torch.float64).reshape(2, 2, 16, 16)
    bands = split(image, scales)
    eps = flow.noise_bands(noise, channels=2, image_size=16)

    def exact(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        del labels
        return tuple(
            flow.path.velocity(bands[p], eps[p], time, flow.stages.activation_times[p])
            for p in range(len(states))
        )

    labels = torch.zeros(2, dtype=torch.long)
    errors = [
        (draw(exact, SamplerConfig(solver=solver, steps=n), flow, noise, labels) - image).norm()
        for n in (100, 200)
    ]
    order = math.log2(errors[0] / errors[1])
    assert order == pytest.approx(SOLVERS[solver].order, abs=0.1)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_samples_do_not_depend_on_how_they_are_batched(scale: float) -> None:
    flow = Flow(FlowConfig(scales=3))
    model = tiny_model(scales=3)
    noise = noise_for(flow, images=5)
    labels = torch.tensor([0, 1, 2, 3, 4])
    config = SamplerConfig(steps=4, guidance_scale=scale)
    whole = draw(model, config, flow, noise, labels)
    parts = [draw(model, config, flow, noise[s], labels[s]) for s in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-9, atol=1e-9)
    assert not whole.requires_grad


def test_guidance_at_scale_one_changes_nothing() -> None:
    model = tiny_model(scales=2)
    states = tiny_states(scales=2, batches=[3, 3])
    time, labels = torch.rand(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    plain = model(states, time, labels)
    for got, want in zip(
        guided(model, scale=1.0, null_label=NULL)(states, time, labels), plain, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_guidance_extrapolates_from_the_null_label() -> None:
    model = tiny_model(scales=2)
    states = tiny_states(scales=2, batches=[3, 3])
    time, labels = torch.rand(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    with_label = model(states, time, labels)
    without = model(states, time, torch.full((3,), NULL))
    for scale in (0.0, 1.5, 4.0):
        mixed = guided(model, scale=scale, null_label=NULL)(states, time, labels)
        for got, yes, no in zip(mixed, with_label, without, strict=True):
            assert (yes - no).abs().max() > 1e-3
            torch.testing.assert_close(got, (1 - scale) * no + scale * yes)


@pytest.mark.parametrize(
    ("changes", "per_step"),
    [
        ({"solver": "euler"}, 1),
        ({"solver": "midpoint"}, 2),
        ({"solver": "heun"}, 2),
        ({"solver": "heun", "guidance_scale": 2.0}, 4),
    ],
)
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_evaluations_are_counted_as_made(
    scales: int, changes: dict[str, object], per_step: int
) -> None:
    flow = Flow(FlowConfig(scales=scales))
    config = SamplerConfig(steps=7, **changes)
    assert network_evaluations(config, flow) == 7 * per_step == counted(config, flow)


def test_guidance_acts_inside_its_interval_only() -> None:
    flow = Flow(FlowConfig(scales=2))
    config = SamplerConfig(
        solver="euler", steps=10, guidance_scale=2.0, guidance_interval=(0.25, 0.65)
    )
    # steps begin at 0, 0.1, ..., 0.9: four of them, 0.3 to 0.6, lie inside
    assert network_evaluations(config, flow) == 14 == counted(config, flow)


def counted(config: SamplerConfig, flow: Flow) -> int:
    evaluations = 0

    def count(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        nonlocal evaluations
        evaluations += time.shape[0]
        assert {s.shape[0] for s in states} == {time.shape[0]} == {labels.shape[0]}
        return states

    draw(count, config, flow, noise_for(flow, images=1), torch.tensor([0]))
    return evaluations


@pytest.mark.parametrize(
    ("times", "steps", "counts"),
    [
        ((), 5, (5,)),
        ((0.5,), 10, (5, 5)),
        ((0.67, 0.33), 3, (1, 1, 1)),
        ((0.67, 0.33), 40, (13, 14, 13)),
        ((0.9,), 10, (9, 1)),
        ((0.999,), 4, (3, 1)),
    ],
)
def test_steps_are_spread_by_length(
    times: tuple[float, ...], steps: int, counts: tuple[int, ...]
) -> None:
    assert steps_per_segment(Stages(times), steps=steps) == counts


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "rk9"}, "solver='rk9'"),
        ({"steps": 0}, "steps=0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_interval": (0.6, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.6, 1.2)}, "guidance_interval"),
    ],
)
def test_settings_that_cannot_be_carried_out_are_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(SamplerConfigError, match=words):
        SamplerConfig(**changes)


def test_fewer_steps_than_segments_are_refused() -> None:
    flow = Flow(FlowConfig(scales=3))
    with pytest.raises(SamplerConfigError, match="3 segments"):
        network_evaluations(SamplerConfig(steps=2), flow)
    with pytest.raises(SamplerConfigError, match="3 segments"):
        draw(
            tiny_model(scales=3),
            SamplerConfig(steps=2),
            flow,
            noise_for(flow, images=1),
            torch.tensor([0]),
        )
