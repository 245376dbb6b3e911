import math

import pytest
import torch

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import Samples, guide, images_per_call, sample
from models.flow.sampler_config import (
    SamplerConfig,
    SamplerConfigError,
    StepsError,
    nfe_per_segment,
)
from models.flow.tableaus import SOLVERS
from models.pyramid import merge, split
from tests.unit.models.reference import tiny_model, tiny_states

NULL = 5


def noise_for(flow: Flow, *, images: int) -> torch.Tensor:
    count = flow.noise_size(channels=2, image_size=16)
    return torch.randn(
        images, count, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )


def draw(
    model,
    config: SamplerConfig,
    flow: Flow,
    noise: torch.Tensor,
    labels: torch.Tensor,
    finest_batch: int | None = None,
) -> Samples:
    return sample(
        model,
        flow=flow,
        config=config,
        noise=noise,
        labels=labels,
        channels=2,
        image_size=16,
        null_label=NULL,
        finest_batch=finest_batch,
    )


def mild(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
    """A velocity that couples scales, pixels, time and label, and is smooth in time."""
    coarse = states[0].mean(dim=(2, 3), keepdim=True)
    waves = torch.sin(3 * time + labels)[:, None, None, None]
    return tuple(torch.tanh(state.roll(1, dims=3)) + waves * (coarse - state) for state in states)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
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
        (draw(exact, config, flow, noise, labels).images - image).norm()
        for config in (SamplerConfig(solver=solver, steps=n) for n in (100, 200))
    ]
    order = math.log2(errors[0] / errors[1])
    assert order == pytest.approx(SOLVERS[solver].order, abs=0.1)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["heun", "ab2"])
def test_samples_do_not_depend_on_how_they_are_batched(solver: str, scale: float) -> None:
    flow = Flow(FlowConfig(scales=3))
    model = tiny_model(scales=3)
    noise = noise_for(flow, images=5)
    labels = torch.tensor([0, 1, 2, 3, 4])
    config = SamplerConfig(solver=solver, steps=4, guidance_scale=scale)
    whole = draw(model, config, flow, noise, labels)
    parts = [
        draw(model, config, flow, noise[s], labels[s]).images for s in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(whole.images, torch.cat(parts), rtol=1e-9, atol=1e-9)
    small = draw(model, config, flow, noise, labels, finest_batch=1)
    torch.testing.assert_close(whole.images, small.images, rtol=1e-9, atol=1e-9)
    assert whole.nfe == small.nfe
    assert not whole.images.requires_grad


@pytest.mark.slow
def test_an_image_by_dopri5_is_the_same_alone_and_in_any_batch() -> None:
    flow = Flow(FlowConfig(scales=3))
    noise, labels = noise_for(flow, images=5), torch.arange(5)
    config = SamplerConfig(
        solver="dopri5",
        absolute_tolerance=1e-8,
        relative_tolerance=1e-8,
        guidance_scale=1.5,
        guidance_interval=(0.2, 0.8),
    )
    whole = draw(mild, config, flow, noise, labels)
    alone = [draw(mild, config, flow, noise[i : i + 1], labels[i : i + 1]) for i in range(5)]
    assert torch.equal(whole.images, torch.cat([one.images for one in alone]))
    for segment in range(3):
        counts = [one.nfe[segment] for one in alone]
        assert whole.nfe[segment] == pytest.approx(sum(counts) / 5)
    assert len({one.nfe for one in alone}) > 1, "the test must have images that differ"
    together = draw(
        mild,
        SamplerConfig(
            solver="dopri5", guidance_scale=1.5, guidance_interval=(0.2, 0.8), adaptive_group=5
        ),
        flow,
        noise,
        labels,
    )
    torch.testing.assert_close(together.images, whole.images, rtol=1e-3, atol=1e-3)
    assert not torch.equal(together.images, whole.images)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [None, (0.15, 0.6)])
def test_every_solver_finds_the_same_samples(interval: tuple[float, float] | None) -> None:
    flow = Flow(FlowConfig(scales=3))
    noise, labels = noise_for(flow, images=2), torch.arange(2)
    guidance = {"guidance_scale": 2.0, "guidance_interval": interval}

    def images(**settings: object) -> torch.Tensor:
        return draw(mild, SamplerConfig(**guidance, **settings), flow, noise, labels).images

    exact = images(solver="dopri5", absolute_tolerance=1e-9, relative_tolerance=1e-9)
    # Where guidance begins or ends inside a step, that step errs in proportion to its length.
    tolerance = 1e-4 if interval is None else 1e-2
    for solver in ("midpoint", "heun", "ab2"):
        difference = (images(solver=solver, steps=400) - exact).abs().max()
        assert difference < tolerance, solver
    plain = draw(mild, SamplerConfig(solver="heun", steps=400), flow, noise, labels).images
    assert (plain - exact).abs().max() > 0.1


@pytest.mark.parametrize(
    ("scales", "finest", "sizes"),
    [(1, 7, (7,)), (2, 3, (15, 3)), (3, 2, (42, 8, 2)), (4, 1, (85, 17, 4, 1))],
)
def test_coarse_segments_take_more_images_for_the_same_tokens(
    scales: int, finest: int, sizes: tuple[int, ...]
) -> None:
    assert images_per_call(scales, finest_batch=finest) == sizes
    flow = Flow(FlowConfig(scales=scales))
    tokens: dict[int, set[int]] = {}

    def count(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        del time, labels
        tokens.setdefault(len(states), set()).add(sum(state[:, 0].numel() for state in states))
        return states

    images = sizes[0] + 1
    draw(
        count,
        SamplerConfig(solver="euler", steps=scales),
        flow,
        noise_for(flow, images=images),
        torch.zeros(images, dtype=torch.long),
        finest_batch=finest,
    )
    finest_tokens = max(tokens[scales])
    assert all(finest_tokens * 0.8 < max(seen) <= finest_tokens for seen in tokens.values())


def test_a_batch_of_no_images_is_refused() -> None:
    with pytest.raises(SamplerConfigError, match="batch of 0"):
        images_per_call(2, finest_batch=0)


def test_guidance_at_scale_one_changes_nothing() -> None:
    model = tiny_model(scales=2)
    states = tiny_states(scales=2, batches=[3, 3])
    time, labels = torch.rand(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    plain = model(states, time, labels)
    for got, want in zip(
        guide(model, scale=1.0, null_label=NULL)(states, time, labels), plain, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_guidance_extrapolates_from_the_null_label() -> None:
    model = tiny_model(scales=2)
    states = tiny_states(scales=2, batches=[3, 3])
    time, labels = torch.rand(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    with_label = model(states, time, labels)
    without = model(states, time, torch.full((3,), NULL))
    for scale in (0.0, 1.5, 4.0):
        mixed = guide(model, scale=scale, null_label=NULL)(states, time, labels)
        for got, yes, no in zip(mixed, with_label, without, strict=True):
            assert (yes - no).abs().max() > 1e-3
            torch.testing.assert_close(got, (1 - scale) * no + scale * yes)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("solver", "per_step", "per_segment"),
    [("euler", 1, 0), ("midpoint", 2, 0), ("heun", 2, 0), ("ab2", 1, 1)],
)
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_evaluations_are_counted_as_made(
    scales: int, solver: str, per_step: int, per_segment: int, guidance_scale: float
) -> None:
    flow = Flow(FlowConfig(scales=scales))
    config = SamplerConfig(steps=7, solver=solver, guidance_scale=guidance_scale)
    pair = 1 if guidance_scale == 1 else 2
    total = pair * (7 * per_step + scales * per_segment)
    assert sum(nfe_per_segment(config, flow.stages)) == total
    assert nfe_per_segment(config, flow.stages) == counted(config, flow)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 14), ("heun", 28), ("ab2", 20)])
def test_guidance_acts_inside_its_interval_only(solver: str, evaluations: int) -> None:
    flow = Flow(FlowConfig(scales=2))
    config = SamplerConfig(
        solver=solver, steps=10, guidance_scale=2.0, guidance_interval=(0.3, 0.7)
    )
    # Four of ten steps are guided. The multistep solver starts anew in each of four pieces, and
    # each fresh start takes one evaluation more: two guided pairs, two without a pair.
    assert sum(nfe_per_segment(config, flow.stages)) == evaluations
    assert nfe_per_segment(config, flow.stages) == counted(config, flow)


def test_evaluations_of_an_adaptive_solver_have_no_formula() -> None:
    with pytest.raises(SamplerConfigError, match=r"Samples\.nfe"):
        nfe_per_segment(SamplerConfig(solver="dopri5"), FlowConfig().stages)


def counted(config: SamplerConfig, flow: Flow) -> tuple[float, ...]:
    """Count the evaluations in each segment by hand, and compare with what the sampler says."""
    calls: dict[int, int] = {}

    def count(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        calls[len(states)] = calls.get(len(states), 0) + time.shape[0]
        assert {s.shape[0] for s in states} == {time.shape[0]} == {labels.shape[0]}
        return states

    drawn = draw(count, config, flow, noise_for(flow, images=3), torch.tensor([0, 1, 2]))
    assert drawn.nfe == tuple(images / 3 for _, images in sorted(calls.items()))
    return drawn.nfe


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "rk9"}, "solver='rk9'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10**9}, "steps=1000000000"),
        ({"adaptive_group": 0}, "adaptive_group=0"),
        ({"absolute_tolerance": 0.0}, "absolute_tolerance=0.0"),
        ({"relative_tolerance": float("nan")}, "relative_tolerance=nan"),
        ({"absolute_tolerance": 1e-300}, "absolute_tolerance=1e-300"),
        ({"relative_tolerance": 9.9e-10}, "relative_tolerance=9.9e-10"),
        ({"relative_tolerance": 1.1}, "relative_tolerance=1.1"),
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
    with pytest.raises(StepsError, match="3 segments"):
        nfe_per_segment(SamplerConfig(steps=2), flow.stages)
    with pytest.raises(StepsError, match="3 segments"):
        draw(
            tiny_model(scales=3),
            SamplerConfig(steps=2),
            flow,
            noise_for(flow, images=1),
            torch.tensor([0]),
        )


@pytest.mark.parametrize("solver", [*SOLVERS, "dopri5"])
def test_who_looks_on_sees_each_step_and_changes_nothing(solver: str) -> None:
    flow = Flow(FlowConfig(scales=3))
    noise = noise_for(flow, images=2)
    config = SamplerConfig(solver=solver, steps=9, adaptive_group=2)
    labels = torch.tensor([0, 1])
    seen: list[tuple[float, Bands]] = []
    shape = {"channels": 2, "image_size": 16, "null_label": NULL}
    watched = sample(
        mild,
        flow=flow,
        config=config,
        noise=noise,
        labels=labels,
        observe=lambda time, states: seen.append((time, states)),
        **shape,
    )
    assert torch.equal(watched.images, draw(mild, config, flow, noise, labels).images)
    assert torch.equal(merge(seen[-1][1]), watched.images)
    times = [time for time, _ in seen]
    assert times == sorted(times)
    entering = flow.stages.activation_times
    assert {time: times.count(time) for time in entering} == dict(
        zip(entering, (1, 2, 2), strict=True)
    )
    assert times[-1] == 1
    # Every step, the start, and each moment at which a scale enters once more.
    if solver != "dopri5":
        assert len(seen) == 9 + 3
    for position, (time, states) in enumerate(seen):
        is_entry = time in entering and (position == 0 or times[position - 1] == time)
        active = sum(time > each for each in entering) + is_entry
        assert len(states) == active
