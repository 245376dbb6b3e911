"""Filling in: what is known stays, and what is missing follows it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.inpaint import InpaintError, inpaint
from models.flow.sampler import Samples, sample
from models.flow.sampler_config import SamplerConfig, nfe_per_segment
from models.flow.tableaus import SOLVERS
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
    assert drawn.nfe == plain.nfe


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
    once = nfe_per_segment(SamplerConfig(steps=8, **settings), flow.stages)
    drawn = filled(flow, known, repeats=repeats, **settings)
    assert drawn.nfe == tuple(repeats * count for count in once)


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


MISSING = {
    "every other pixel": lambda row, column: (row + column) % 2 == 0,
    "the last row": lambda row, column: (row == 3) & (column >= 0),
    "one half": lambda row, column: (row >= 2) & (column >= 0),
}


class FillingIn:
    """Gaussian images with missing pixels, of which the right law is known, and what is drawn."""

    def __init__(self, missing: str, *, scales: int, count: int) -> None:
        self._config = FlowConfig(scales=scales)
        self._data = data = smooth_images(4)
        self._generator = torch.Generator().manual_seed(scales)
        self._images = data.draw(count, self._generator)
        row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        self.known = (~MISSING[missing](row, column)).expand(count, 1, 4, 4)
        k = self._k = self.known[0].flatten()
        gain = data.covariance[~k][:, k] @ torch.linalg.inv(data.covariance[k][:, k])
        centred = self._images.flatten(1)[:, k] - data.mean[k]
        self.right_mean = data.mean[~k] + centred @ gain.T
        self._right_spread = data.covariance[~k][:, ~k] - gain @ data.covariance[k][:, ~k]

    def right(self) -> torch.Tensor:
        root = torch.linalg.cholesky(self._right_spread)
        noise = torch.randn(self.right_mean.shape, generator=self._generator)
        return self.right_mean + noise.double() @ root.T

    def best(self) -> float:
        """Correlation of right pixels with their right mean."""
        variance = self._data.covariance.diagonal()[~self._k].sum()
        return float((1 - self._right_spread.diagonal().sum() / variance).sqrt())

    def drawn(self, repeats: int, known: torch.Tensor) -> torch.Tensor:
        count, flow = len(self._images), Flow(self._config)
        filled_in = inpaint(
            OptimalVelocity(self._data, self._config, sees="full"),
            flow=flow,
            config=SamplerConfig(steps=20),
            images=self._images,
            known=known,
            noise=draws(flow, images=count, channels=1, size=4),
            labels=torch.zeros(count, dtype=torch.long),
            null_label=0,
            repeats=repeats,
        ).images
        return filled_in.flatten(1)[:, ~self._k]

    def surprise(self, pixels: torch.Tensor) -> float:
        """Squared deviation from the right mean in units of the right spread; 1 is right."""
        deviation = pixels - self.right_mean
        return float((deviation @ torch.linalg.inv(self._right_spread) * deviation).mean())


@pytest.mark.parametrize("missing", ["the last row", "every other pixel"])
@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.slow
def test_what_is_missing_follows_what_is_known(scales: int, missing: str) -> None:
    """On Gaussian images, where the right answer is known: mean and spread given the known pixels.

    The last row is half of every block it touches, so a coarse band is never known there.
    """
    case = FillingIn(missing, scales=scales, count=300)
    right, nothing = case.right(), torch.zeros_like(case.known)
    chance, once, often = (
        case.drawn(repeats, known)
        for repeats, known in ((1, nothing), (1, case.known), (8, case.known))
    )
    best = correlation(right, case.right_mean)
    assert abs(correlation(chance, case.right_mean)) < 0.15
    assert correlation(once, case.right_mean) > 0.4
    assert correlation(often, case.right_mean) > 0.9 * best
    assert case.surprise(right) == pytest.approx(1, abs=0.15)
    assert case.surprise(once) < case.surprise(chance) / 2
    assert case.surprise(often) < 1.7


def documented() -> dict[tuple[str, str], float]:
    """Cells of the table in docs/sample.md, by what is missing and repeats."""
    text = (Path(__file__).parents[3] / "docs" / "sample.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text[text.index("| missing |") :].partition("\n\n")[0].splitlines()
    ]
    columns = [name.partition(" ")[0] for name in rows[0][1:]]
    return {
        (row[0], column): float(cell)
        for row in rows[2:]
        for column, cell in zip(columns, row[1:], strict=True)
    }


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.slow
def test_the_table_of_repeats_is_what_is_drawn(missing: str) -> None:
    cells = {column: cell for (name, column), cell in documented().items() if name == missing}
    assert list(cells) == ["1", "3", "5", "8", "20", "best"]
    assert FillingIn(missing, scales=2, count=1).best() == pytest.approx(
        cells.pop("best"), abs=0.006
    )
    for repeats, cell in ((int(column), cell) for column, cell in cells.items()):
        # Neighbouring pixels are alike, so 400 images with 8 of them hold about 1,000 values: the
        # standard error of a correlation of 0.5 is 0.02.
        case = FillingIn(missing, scales=2, count=max(400, 2000 // repeats))
        found = correlation(case.drawn(repeats, case.known), case.right_mean)
        assert found == pytest.approx(cell, abs=0.05), repeats


@pytest.mark.usefixtures("without_type_checks")
def test_requests_that_cannot_be_carried_out_are_refused() -> None:
    flow, known = Flow(FlowConfig(scales=2)), torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool)
    with pytest.raises(InpaintError, match="dopri5 cannot fill in"):
        filled(flow, known, solver="dopri5")
    with pytest.raises(InpaintError, match="repeats=0"):
        filled(flow, known, repeats=0)
    with pytest.raises(InpaintError, match=r"\(3, 1, 4, 8\) does not fit .*\(3, 2, 8, 8\)"):
        filled(flow, known[:, :, :4])
