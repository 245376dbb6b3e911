"""Strips: a film ends with the sample and hides no scale; an interpolation ends with both seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.flow.sampler_config import SamplerConfig
from tests.support.saved import save_random_model
from trainer.cli import sample
from trainer.evaluation.config import ModelSource
from trainer.evaluation.loading import load_model
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.strips import between, film, film_picture, interpolation, picture_of
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("run")
    save_random_model(open_store(f"{place}/runs", StoreConfig()), run="small")
    return f"{place}/runs/small"


@pytest.fixture(scope="module")
def loaded(run: str) -> tuple[ImageSampler, nn.Module]:
    trained = load_model(ModelSource(checkpoint=run, device="cpu"))
    sampler = trained.image_sampler(SamplerConfig(solver="heun", steps=8), seed=3, batch=4)
    return sampler, trained.model


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
def test_a_film_goes_from_the_noise_to_the_sample_and_shows_where_a_scale_enters(
    loaded: tuple[ImageSampler, nn.Module], solver: str
) -> None:
    sampler, model = loaded
    coarse = {"solver": solver, "absolute_tolerance": 1e-2, "relative_tolerance": 1e-2}
    sampler = replace(sampler, sampler=replace(sampler.sampler, **coarse))
    moments = film(sampler, model, 1, index=2, moments=6)
    times = [moment.time for moment in moments]
    assert times == sorted(set(times))
    assert (times[0], times[-1]) == (0, 1)
    assert len(times) <= 6
    enters = sampler.flow.stages.activation_times[1]
    assert enters in times
    for moment in moments:
        assert len(moment.bands) == (1 if moment.time < enters else 2)
    noise = sampler.flow.noise_bands(sampler.noise(first=2, count=1), channels=3, image_size=8)
    assert torch.equal(moments[0].bands[0], noise[0])
    # A band enters as noise alone, scaled by what is left of it.
    entering = moments[times.index(enters)].bands[1]
    assert torch.allclose(entering, noise[1] * (1 - enters))
    drawn = sampler.block(model, torch.tensor([1]), first=2, size=1)
    assert torch.equal(picture_of(sampler, moments[-1].bands), drawn.images)
    # Before the finer scale is there, pixels are the same in blocks.
    early = picture_of(sampler, moments[0].bands)
    assert torch.equal(early, early[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_picture_of_a_film_says_what_is_not_there_yet(
    loaded: tuple[ImageSampler, nn.Module],
) -> None:
    sampler, model = loaded
    films = [film(sampler, model, label, index=label, moments=5) for label in (0, 1)]
    figure = film_picture(sampler, films, [0, 1])
    before = sum(len(moment.bands) == 1 for moment in films[0])
    assert 0 < before < len(films[0])
    for part, moments, label in zip(figure.subfigs, films, (0, 1), strict=True):
        panels = np.array(part.axes).reshape(3, len(moments))
        assert [panel.get_ylabel() for panel in panels[:, 0]] == [
            "scale 1\n4 x 4",
            "scale 0\n8 x 8",
            f"class {label}",
        ]
        for column, moment in enumerate(moments):
            assert panels[0, column].get_title() == f"t = {moment.time:.2f}"
            is_there = len(moment.bands) == 2
            assert [len(panel.images) for panel in panels[:, column]] == [1, is_there, 1]
            words = [text.get_text() for text in panels[1, column].texts]
            enters = sampler.flow.stages.activation_times[1]
            assert words == ([] if is_there else [f"not yet,\nfrom {enters:.2f}"])


def test_noise_turns_evenly_along_a_circle_and_stays_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 3, 20_000, generator=generator)
    mixed = between(start, end, 5)
    assert mixed.shape == (3, 5, 20_000)
    assert torch.equal(mixed[:, 0], start)
    assert torch.equal(mixed[:, -1], end)
    # The standard error of a standard deviation of 20,000 numbers is 0.005.
    assert mixed.std(2) == pytest.approx(np.ones((3, 5)), abs=0.025)
    unit = nn.functional.normalize(mixed.double(), dim=2)
    steps = torch.arccos((unit[:, 1:] * unit[:, :-1]).sum(2))
    assert steps == pytest.approx(steps.mean(1, keepdim=True).expand(3, 4).numpy(), rel=0.02)
    # A straight line would lose a third of the deviation in the middle.
    assert ((start + end) / 2).std() < 0.75
    assert torch.equal(between(start, start, 4), start[:, None].expand(3, 4, 20_000))
    assert torch.equal(between(start, end, 1), start[:, None])


def test_an_interpolation_begins_and_ends_with_the_samples_of_its_seeds(
    loaded: tuple[ImageSampler, nn.Module],
) -> None:
    sampler, model = loaded
    ends = (replace(sampler, seed=3), replace(sampler, seed=5))
    rows = interpolation(sampler, model, [1, 0], ends=ends, steps=4).unflatten(0, (2, 4))
    for end, column in zip(ends, (0, -1), strict=True):
        expected = end.all(model, torch.tensor([1, 0])).images
        assert torch.allclose(rows[:, column], expected, atol=1e-5)
    for before, after in zip(rows.unbind(1)[:-1], rows.unbind(1)[1:], strict=True):
        assert (before - after).abs().max() > 0.01


def test_the_command_draws_strips(run: str, tmp_path: Path, capsys) -> None:
    def words(**settings: object) -> list[str]:
        given = {"checkpoint": run, "device": "cpu", "sampler.steps": 4, "columns": 3, **settings}
        return [f"{name}={value}" for name, value in given.items()]

    assert sample.main(words(film="true", output=tmp_path / "film.png")) == 0
    with Image.open(tmp_path / "film.png") as picture:
        assert min(picture.size) > 300
    assert sample.main(words(interpolate="3:5", output=tmp_path / "between.png")) == 0
    assert sample.main(words(columns=1, seed=5, output=tmp_path / "end.png")) == 0
    strip, end = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("between", "end"))
    last = strip[:, -end.shape[1] :].astype(int)
    assert np.abs(last - end).max() <= 1
    capsys.readouterr()
    for wrong, message in (
        ({"interpolate": "3"}, "interpolate='3' must be two seeds, as in interpolate=3:5"),
        ({"interpolate": "3:5", "film": "true"}, "film and interpolate are asked for at once"),
        ({"n": 5, "film": "true"}, "n and film are asked for at once"),
        ({"n": 0}, "n=0 must be at least 1"),
        (
            {"n": 5, "device": "auto", "output": tmp_path / "x.png"},
            "x.png names a file, but n=5 samples go into a folder",
        ),
        ({"n": 5}, "device=cpu is for a grid"),
    ):
        assert sample.main(words(**wrong)) == 2
        assert message in capsys.readouterr().err


def test_a_grid_is_written_to_a_store_too(run: str, tmp_path: Path) -> None:
    words = [f"checkpoint={run}", "device=cpu", "sampler.steps=2", "columns=2"]
    for output in (f"{tmp_path}/here.png", f"file://{tmp_path}/there.png"):
        assert sample.main([*words, f"output={output}"]) == 0
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()
