"""Variations of one layout in grids and sets: rows, classes, and the same however they are cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.flow.sampler_config import SamplerConfig, SamplerConfigError
from tests.support.saved import save_random_model
from tests.unit.trainer.evaluation.test_sample_set import finished, pixels
from trainer.cli import sample
from trainer.config.reading import ConfigError, to_dict
from trainer.evaluation.config import ModelSource
from trainer.evaluation.loading import LoadedModel, choose_model, load_model
from trainer.evaluation.sample_set import SamplePlan
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

EULER = SamplerConfig(solver="euler", steps=4, guidance_scale=2.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("run")
    save_random_model(open_store(f"{place}/runs", StoreConfig()), run="small")
    return ModelSource(checkpoint=f"{place}/runs/small", home=f"{place}/home", device="cpu")


@pytest.fixture(scope="module")
def trained(source: ModelSource) -> LoadedModel:
    return load_model(source)


def test_variations_have_one_coarse_picture_and_fine_ones_of_their_own(
    trained: LoadedModel,
) -> None:
    sampler = trained.image_sampler(EULER, seed=3, batch=7, share_coarse=3)
    assert sampler.most == 6
    labels = torch.tensor([1, 0, 1]).repeat_interleave(3)
    drawn = sampler.all(trained.model, labels)
    seen: list[list[int]] = []
    sampler.from_noise(
        trained.model,
        sampler.noise(first=0, count=9),
        labels,
        observe=lambda _time, states: seen.append([len(state) for state in states]),
    )
    assert (seen[0], seen[-1]) == ([3], [3, 9])
    apart = (drawn.images[1:] - drawn.images[:-1]).abs().amax((1, 2, 3))
    assert apart.min() > 0.01
    # One evaluation a step, two where guided; a coarse one is for three images.
    assert drawn.nfe == pytest.approx((4 / 3, 4))
    # The first of each layout is the sample of its index.
    plain = trained.image_sampler(EULER, seed=3, batch=7).all(trained.model, labels).images
    torch.testing.assert_close(drawn.images[::3], plain[::3])


def test_a_set_of_layouts_does_not_depend_on_the_cut(source: ModelSource, tmp_path: Path) -> None:
    plan = SamplePlan(
        run="small",
        images=100,
        attempt=choose_model(source).manifest.attempt,
        weights="ema",
        sampler=to_dict(EULER),
        seed=3,
        batch=4,
        classes=(1, 0),
        samples=11,
        part_samples=4,
        format="npz",
        share_coarse=2,
    )
    assert plan.labels(range(11)).tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    finished(source, plan, tmp_path / "plan")
    images = pixels(tmp_path / "plan")
    stored = np.load(tmp_path / "plan" / "samples.npz")["arr_1"]
    assert stored.tolist() == plan.labels(range(11)).tolist()
    finished(source, replace(plan, part_samples=8), tmp_path / "parts")
    assert np.array_equal(pixels(tmp_path / "parts"), images)
    finished(source, replace(plan, batch=2), tmp_path / "batch")
    assert np.abs(pixels(tmp_path / "batch").astype(int) - images).max() <= 1
    assert len({image.tobytes() for image in images}) == 11


def test_a_grid_has_a_row_for_each_layout(source: ModelSource, tmp_path: Path, capsys) -> None:
    words = [f"checkpoint={source.checkpoint}", "device=cpu", "sampler.steps=2", "columns=7"]
    output = tmp_path / "grid.png"
    shared = [*words, "share_coarse=3", f"output={output}"]
    assert sample.main([*shared, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # Two classes, and room for two layouts of three in seven columns.
    assert (told["images"], told["columns"]) == (12, 3)
    cells = np.asarray(Image.open(output))
    assert (cells.shape[0] - 4, cells.shape[1] - 4) == (4 * 52, 3 * 52)
    assert sample.main([*shared, "columns=1", "classes=[1]", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["columns"]) == (3, 3)


def test_layouts_that_cannot_be_drawn_are_refused(
    source: ModelSource, trained: LoadedModel, tmp_path: Path, capsys
) -> None:
    words = [f"checkpoint={source.checkpoint}", "share_coarse=3"]
    for more, message in (
        (["film=true"], "share_coarse=3 is for grids and sets; leave it out with film"),
        (["interpolate=1:2"], "leave it out with interpolate"),
        (["batch=2", "device=cpu"], "batch=2 has no room for them; raise batch"),
        (["n=6", "batch=2", f"output={tmp_path}/set"], "batch=2 has no room for them"),
        (["sampler.solver=dopri5", "device=cpu"], "share_coarse=3 needs a solver of fixed steps"),
        (["share_coarse=0"], "share_coarse=0 must be at least 1"),
    ):
        assert sample.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    record = trained.record
    full = replace(record, transformer=replace(record.transformer, attention="full"))
    with pytest.raises(ConfigError, match="model of attention=full"):
        full.check_shared(2, EULER)
    with pytest.raises(SamplerConfigError, match="needs two or more scales"):
        replace(record, flow=replace(record.flow, scales=1)).check_shared(2, EULER)
    full.check_shared(1, EULER)
