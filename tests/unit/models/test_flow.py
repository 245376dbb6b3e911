import pytest
import torch

from models.flow.config import FlowConfig, FlowConfigError
from models.flow.flow import Flow
from models.flow.stages import StagesError
from models.pyramid import PyramidError


def as_matrices(flow: Flow, *, channels: int, image_size: int) -> list[torch.Tensor]:
    """The linear map from drawn numbers to each band, one row for each number."""
    count = flow.noise_size(channels=channels, image_size=image_size)
    basis = torch.eye(count, dtype=torch.float64)
    bands = flow.noise_bands(basis, channels=channels, image_size=image_size)
    return [band.flatten(1) for band in bands]


@pytest.mark.parametrize(
    ("scales", "variances"),
    [
        (1, (1,)),
        (2, (1 / 4, 3 / 4)),
        (3, (1 / 16, 3 / 16, 3 / 4)),
        (4, (1 / 64, 3 / 64, 3 / 16, 3 / 4)),
    ],
)
def test_banded_noise_has_the_variances_of_the_pyramid(
    scales: int, variances: tuple[float, ...]
) -> None:
    flow = Flow(FlowConfig(scales=scales))
    assert flow.noise_size(channels=2, image_size=8) == 2 * 64
    maps = as_matrices(flow, channels=2, image_size=8)
    for matrix, variance in zip(maps, variances, strict=True):
        torch.testing.assert_close(
            matrix.square().sum(0), torch.full_like(matrix[0], variance), rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_independent_noise_is_white(scales: int) -> None:
    flow = Flow(FlowConfig(scales=scales, noise="independent"))
    assert flow.noise_size(channels=2, image_size=8) == sum(
        2 * (8 >> k) ** 2 for k in range(scales)
    )
    joint = torch.cat(as_matrices(flow, channels=2, image_size=8), dim=1)
    assert torch.equal(joint.T @ joint, torch.eye(joint.shape[1], dtype=torch.float64))


def test_noise_of_another_size_is_refused() -> None:
    flow = Flow(FlowConfig())
    with pytest.raises(FlowConfigError, match="takes 64 numbers, got 63"):
        flow.noise_bands(torch.zeros(2, 63), channels=1, image_size=8)
    with pytest.raises(PyramidError, match="7 pixels"):
        flow.noise_size(channels=1, image_size=7)


def test_the_flow_takes_the_configs_times_and_weights() -> None:
    flow = Flow(FlowConfig(scales=3, critical_times=(0.8, 0.2), scale_weights=(1.0, 2.0, 3.0)))
    assert flow.stages.activation_times == (0.0, 0.2, 0.8)
    assert flow.scale_weights == (1.0, 2.0, 3.0)
    assert Flow(FlowConfig(scales=3)).scale_weights == (1.0, 1.0, 1.0)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "cubic"}, "path='cubic'"),
        ({"noise": "pink"}, "noise='pink'"),
        ({"time_sampler": "beta"}, "time_sampler='beta'"),
        ({"stage_choice": "random"}, "stage_choice='random'"),
        ({"scales": 3, "critical_times": (0.5,)}, "give 2 times"),
        ({"scale_weights": (1.0,)}, "scale_weights"),
        ({"scale_weights": (1.0, 0.0)}, "positive"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(FlowConfigError, match=words):
        FlowConfig(**changes)


def test_bad_critical_times_are_refused() -> None:
    with pytest.raises(StagesError):
        FlowConfig(scales=3, critical_times=(0.3, 0.6))
    with pytest.raises(StagesError):
        FlowConfig(scales=0)
