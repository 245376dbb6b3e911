from itertools import pairwise

import pytest
import torch

from models.axes import Bands
from models.flow.config import FlowConfig, FlowConfigError
from models.flow.flow import Flow
from models.flow.objective import BatchError, Objective
from models.pyramid import split
from tests.unit.models.reference import tiny_model

SIZE = 16


def batch(flow: Flow, *, images: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(3)
    count = flow.noise_size(channels=2, image_size=SIZE)
    pixels = torch.randn(images, 2, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return {
        "bands": split(pixels, flow.stages.scales),
        "labels": torch.randint(0, 6, (images,), generator=generator),
        "uniforms": torch.rand(images, generator=generator, dtype=torch.float64),
        "noise": torch.randn(images, count, generator=generator, dtype=torch.float64),
    }


class Recorder:
    """A velocity model that keeps what it is given and answers zero."""

    def __call__(self, states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        self.states, self.time, self.labels = states, time, labels
        return tuple(torch.zeros_like(state) for state in states)


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("noise", ["banded", "independent"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_stratified_loss_is_the_mean_of_the_stages_losses(
    scales: int, noise: str, path: str
) -> None:
    weights = (0.5, 1.0, 2.0, 3.0)[:scales]
    flow = Flow(FlowConfig(scales=scales, path=path, noise=noise, scale_weights=weights))
    model = tiny_model(scales=scales)
    data = batch(flow, images=2 * scales)
    report = Objective(flow)(model, **data)

    noise_bands = flow.noise_bands(data["noise"], channels=2, image_size=SIZE)
    stage_losses, errors = [], [[] for _ in range(scales)]
    for stage in range(scales):
        mine = torch.arange(stage, 2 * scales, scales)
        active = scales - stage
        taus = flow.stages.activation_times
        tau = taus[active - 1]
        time = tau + (1 - tau) * data["uniforms"][mine]
        parts = [
            (data["bands"][p][mine], noise_bands[p][mine], time, taus[p]) for p in range(active)
        ]
        states = tuple(flow.path.state(*part) for part in parts)
        velocities = model(states, time, data["labels"][mine])
        loss = 0.0
        for p in range(active):
            error = (velocities[p] - flow.path.velocity(*parts[p])).square().mean()
            errors[p].append(error)
            loss = loss + weights[p] * error
        stage_losses.append(loss)
    torch.testing.assert_close(report.total, sum(stage_losses) / scales)
    expected = torch.stack([sum(e) / len(e) for e in errors])
    torch.testing.assert_close(report.per_scale, expected)
    assert report.total.requires_grad
    assert not report.per_scale.requires_grad


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_the_sum_weighs_a_scale_by_its_elements(scales: int) -> None:
    weights = tuple(1.0 + p for p in range(scales))
    mean = Flow(FlowConfig(scales=scales, scale_weights=weights))
    summed = Flow(FlowConfig(scales=scales, scale_weights=weights, loss_norm="sum"))
    data = batch(mean, images=2 * scales)
    reports = [Objective(flow)(Recorder(), **data) for flow in (mean, summed)]
    # What is told is the mean, whatever the norm.
    torch.testing.assert_close(reports[0].per_scale, reports[1].per_scale)
    shares = [
        weight * carrying / (2 * scales) * error
        for weight, carrying, error in zip(
            weights, reports[0].images_per_scale, reports[0].per_scale, strict=True
        )
    ]
    elements = [2 * (SIZE >> k) ** 2 for k in reversed(range(scales))]
    assert all(fine == 4 * coarse for coarse, fine in pairwise(elements))
    torch.testing.assert_close(reports[0].total, sum(shares))
    torch.testing.assert_close(
        reports[1].total, sum(n * share for n, share in zip(elements, shares, strict=True))
    )


def test_the_printed_norm_of_one_scale_is_the_squared_distance() -> None:
    flow = Flow(FlowConfig(scales=1, loss_norm="sum"))
    data = batch(flow, images=5)
    recorder = Recorder()
    total = Objective(flow)(recorder, **data).total
    noise = data["noise"].reshape(5, 2, SIZE, SIZE)
    distance = torch.linalg.vector_norm(data["bands"][0] - noise, dim=(1, 2, 3)).square()
    torch.testing.assert_close(total, distance.mean())


def test_one_scale_is_plain_rectified_flow() -> None:
    flow = Flow(FlowConfig(scales=1))
    data = batch(flow, images=5)
    model = tiny_model(scales=1)
    (clean,), noise, time = data["bands"], data["noise"].reshape(5, 2, SIZE, SIZE), data["uniforms"]
    t = time.reshape(5, 1, 1, 1)
    (velocity,) = model((t * clean + (1 - t) * noise,), time, data["labels"])
    expected = (velocity - (clean - noise)).square().mean()
    torch.testing.assert_close(Objective(flow)(model, **data).total, expected)


def test_images_are_sorted_by_stage_and_carried_as_slices() -> None:
    flow = Flow(FlowConfig(scales=3))
    data = batch(flow, images=6) | {"labels": torch.arange(6)}
    seen = Recorder()
    Objective(flow)(seen, **data)
    assert seen.labels.tolist() == [0, 3, 1, 4, 2, 5]
    assert [state.shape[0] for state in seen.states] == [6, 4, 2]
    taus = torch.tensor([0.67, 0.67, 0.33, 0.33, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(seen.time, taus + (1 - taus) * data["uniforms"][seen.labels])


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_shares_of_the_stages_are_exact(scales: int) -> None:
    flow = Flow(FlowConfig(scales=scales))
    data = batch(flow, images=4 * scales)
    data["uniforms"] = torch.zeros_like(data["uniforms"])
    seen = Recorder()
    Objective(flow)(seen, **data)
    for tau in flow.stages.activation_times:
        assert (seen.time == tau).sum() == 4


def test_exact_velocities_have_no_loss() -> None:
    flow = Flow(FlowConfig(scales=2))
    data = batch(flow, images=4)
    order = torch.tensor([0, 2, 1, 3])
    noise_bands = flow.noise_bands(data["noise"], channels=2, image_size=SIZE)

    def exact(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        del labels
        return tuple(
            flow.path.velocity(
                data["bands"][p][order[: s.shape[0]]],
                noise_bands[p][order[: s.shape[0]]],
                time[: s.shape[0]],
                flow.stages.activation_times[p],
            )
            for p, s in enumerate(states)
        )

    assert Objective(flow)(exact, **data).total == 0


def linear(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
    """A fixed linear network: a scale from itself, the coarsest one, its time and its label."""
    outputs = []
    for position, state in enumerate(states):
        images = state.shape[0]
        condition = (2 * time + labels)[:images, None, None, None]
        coarse = states[0][:images].mean(dim=(2, 3), keepdim=True)
        outputs.append((position + 1) * state.flip(3) - coarse + 0.1 * condition)
    return tuple(outputs)


@pytest.mark.parametrize("time_sampler", ["uniform", "logit_normal"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_one_stage_per_step_has_the_expectation_of_stratified_stages(
    scales: int, time_sampler: str
) -> None:
    """Averaged over all stages, against every image dealt out to every stage in turn."""
    choices = {
        "scales": scales,
        "scale_weights": (0.5, 1.0, 2.0, 3.0)[:scales],
        "time_sampler": time_sampler,
    }
    flow = Flow(FlowConfig(**choices))
    data = batch(flow, images=3 * scales)
    single = Objective(Flow(FlowConfig(stage_choice="one_per_step", **choices)))
    per_stage = [single(linear, stage=stage, **data).total for stage in range(scales)]
    dealt = []
    for turn in range(scales):
        turned = {
            name: tuple(band.roll(turn, dims=0) for band in value)
            if name == "bands"
            else value.roll(turn, dims=0)
            for name, value in data.items()
        }
        dealt.append(Objective(flow)(linear, **turned).total)
    torch.testing.assert_close(sum(per_stage) / scales, sum(dealt) / scales, rtol=1e-12, atol=0)
    assert len({loss.item() for loss in per_stage}) == scales


def test_at_one_stage_all_images_carry_its_scales_at_its_times() -> None:
    flow = Flow(FlowConfig(scales=3, stage_choice="one_per_step"))
    data = batch(flow, images=5) | {"labels": torch.arange(5)}
    for stage, tau in enumerate((0.67, 0.33, 0.0)):
        seen = Recorder()
        report = Objective(flow)(seen, stage=stage, **data)
        assert seen.labels.tolist() == [0, 1, 2, 3, 4]
        assert [state.shape[0] for state in seen.states] == [5] * (3 - stage)
        torch.testing.assert_close(seen.time, tau + (1 - tau) * data["uniforms"])
        assert report.images_per_scale == (*[5] * (3 - stage), *[0] * stage)
        assert (report.per_scale > 0).tolist() == [count > 0 for count in report.images_per_scale]


@pytest.mark.parametrize("choice", ["stratified", "one_per_step"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_losses_by_time_are_those_of_the_images_in_each_part(scales: int, choice: str) -> None:
    flow = Flow(FlowConfig(scales=scales, stage_choice=choice))
    data = batch(flow, images=12)
    seen = Recorder()
    stage = scales // 2 if choice == "one_per_step" else None
    report = Objective(flow)(seen, stage=stage, **data)
    noise_bands = flow.noise_bands(data["noise"], channels=2, image_size=SIZE)
    order = torch.arange(12)
    if stage is None:
        order = order.reshape(-1, scales).T.flatten()
    sums, counts = torch.zeros(2, scales, 5, dtype=torch.float64)
    for position, state in enumerate(seen.states):
        tau = flow.stages.activation_times[position]
        mine = order[: state.shape[0]]
        own_time = seen.time[: state.shape[0]]
        target = flow.path.velocity(
            data["bands"][position][mine], noise_bands[position][mine], own_time, tau
        )
        for image, time in enumerate(own_time.tolist()):
            part = next(index for index in range(5) if time < (index + 1) / 5)
            sums[position, part] += target[image].square().mean()
            counts[position, part] += 1
    torch.testing.assert_close(report.time_sums, sums)
    assert torch.equal(report.time_counts, counts)
    assert counts.sum(1).tolist() == list(report.images_per_scale)
    carried = report.time_counts.sum(1) > 0
    means = report.time_sums.sum(1)[carried] / report.time_counts.sum(1)[carried]
    torch.testing.assert_close(means, report.per_scale[carried])


def test_the_end_of_time_belongs_to_the_last_part() -> None:
    flow = Flow(FlowConfig(scales=1))
    data = batch(flow, images=2)
    data["uniforms"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert Objective(flow)(Recorder(), **data).time_counts.tolist() == [[1, 0, 0, 0, 1]]


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("choice", ["stratified", "one_per_step"])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_the_target_is_the_finite_difference_of_the_states_shown(
    scales: int, choice: str, path: str
) -> None:
    """A network that answers how its own input changes with time has no loss."""
    flow = Flow(FlowConfig(scales=scales, stage_choice=choice, path=path))
    data = batch(flow, images=scales) | {"uniforms": torch.full((scales,), 0.4).double()}
    stage = scales - 1 if choice == "one_per_step" else None
    shown = []
    for shift in (-1e-6, 1e-6):
        seen = Recorder()
        moved = data | {"uniforms": data["uniforms"] + shift}
        Objective(flow)(seen, stage=stage, **moved)
        shown.append(seen)
    before, after = shown

    def difference(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        del time, labels
        elapsed = (after.time - before.time)[:, None, None, None]
        return tuple(
            (late - early) / elapsed[: state.shape[0]]
            for state, early, late in zip(states, before.states, after.states, strict=True)
        )

    assert Objective(flow)(difference, stage=stage, **data).per_scale.max() < 1e-15


def test_a_stage_that_does_not_suit_the_flow_is_refused() -> None:
    dealt = Flow(FlowConfig(scales=2))
    with pytest.raises(BatchError, match="stage=0 does not suit stage_choice=stratified"):
        Objective(dealt)(Recorder(), stage=0, **batch(dealt, images=2))
    single = Flow(FlowConfig(scales=2, stage_choice="one_per_step"))
    with pytest.raises(BatchError, match="stage=None does not suit stage_choice=one_per_step"):
        Objective(single)(Recorder(), **batch(single, images=2))
    with pytest.raises(BatchError, match="stage=2 is not among"):
        Objective(single)(Recorder(), stage=2, **batch(single, images=2))


def test_batches_that_cannot_be_dealt_out_are_refused() -> None:
    flow = Flow(FlowConfig(scales=2))
    for images in (0, 3):
        with pytest.raises(BatchError, match=f"batch of {images} images"):
            Objective(flow)(Recorder(), **batch(flow, images=images))
    data = batch(flow, images=4)
    with pytest.raises(BatchError, match="has 1 bands"):
        Objective(flow)(Recorder(), **(data | {"bands": data["bands"][1:]}))
    with pytest.raises(FlowConfigError, match="numbers"):
        Objective(flow)(Recorder(), **(data | {"noise": data["noise"][:, 1:]}))
