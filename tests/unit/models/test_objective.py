import pytest
import torch

from models.axes import Bands
from models.flow.flow import Flow, FlowConfig, FlowConfigError
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
