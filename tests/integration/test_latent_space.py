"""A whole job in latent space: encoded as it trains, decoded to be seen, resumed to the bit."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.ingest.digits import ensure_digits
from tests.support.autoencoder import saved_autoencoder
from tests.support.job import final_state
from trainer import sample
from trainer.launch import main
from trainer.trained.evaluation import (
    CheckpointEvaluationConfig,
    RealImagesConfig,
    evaluate_checkpoints,
)

pytestmark = pytest.mark.slow

# Digits enlarged to 64 pixels; their latents are 8 x 8 with 4 channels.
JOB = (
    "+exp=digits",
    "data.prepare=none",
    "data.image_size=64",
    "cluster.backend=local",
    "cluster.workers=1",
    "engine=plain",
    "model.depth=1",
    "model.width=16",
    "model.patch_size=2",
    "train.global_batch=32",
    "train.total_images=128",
    "checkpoint.interval_images=64",
    "runtime.log_interval_images=64",
    "eval.samples=20",
    "eval.batch=8",
    "eval.sampler.steps=2",
    "eval.classifier=false",
    "eval.grid_interval_images=64",
    "codec.kind=autoencoder_kl",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    ensure_digits(str(folder / "digits"))
    saved_autoencoder(folder / "autoencoder")
    return folder


@pytest.fixture(scope="module")
def launch(place):
    def run(*overrides: str) -> int:
        return main(
            [
                *JOB,
                f"home={place}/home",
                f"data.prefix={place}/digits",
                f"codec.source={place}/autoencoder",
                *overrides,
            ]
        )

    return run


@pytest.fixture(scope="module")
def whole(place, launch) -> Path:
    """A run that nothing interrupted."""
    assert launch("run=whole") == 0
    return place / "home" / "store" / "runs" / "whole"


def test_samples_and_grids_are_pictures_of_the_size_of_the_images(whole):
    folder = whole / "evaluation" / "000000000128"
    samples = np.load(folder / "samples.npz")
    assert samples["arr_0"].shape == (20, 64, 64, 1)
    assert len(np.unique(samples["arr_0"])) > 2
    grid = Image.open(io.BytesIO((folder / "grid.png").read_bytes()))
    assert grid.width % (64 + 4) == 4


def test_a_resumed_run_is_the_same_to_the_bit_wherever_the_autoencoder_is(place, whole, launch):
    moved = shutil.copytree(place / "autoencoder", place / "moved")
    first_half = whole / "checkpoints" / "000000000064"
    assert launch("run=resumed", f"resume={first_half}", f"codec.source={moved}") == 0
    store = str(place / "home" / "store")
    before, after = final_state(store, "whole"), final_state(store, "resumed")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    reports = [
        json.loads(
            (place / f"home/store/runs/{run}/evaluation/000000000128/report.json").read_text()
        )
        for run in ("whole", "resumed")
    ]
    assert reports[0]["frechet"] == reports[1]["frechet"]


def test_another_autoencoder_is_another_run(place, whole, launch, capfd):
    saved_autoencoder(place / "other", seed=1)
    assert launch("run=whole", f"codec.source={place}/other") == 2
    assert "autoencoder.sha256" in capfd.readouterr().err


def test_a_missing_autoencoder_is_found_out_before_anything_starts(place, launch, capfd):
    assert launch("run=never", f"codec.source={place}/nowhere") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{place}/nowhere" in error
    assert not (place / "home" / "store" / "runs" / "never" / "checkpoints").exists()


def test_a_checkpoint_is_sampled_and_measured_in_pixels(place, whole, capfd):
    checkpoint = whole / "checkpoints" / "000000000128"
    words = [
        f"checkpoint={checkpoint}",
        f"output={place}/drawn.png",
        "classes=[1,2]",
        "columns=3",
        "sampler.steps=2",
        f"home={place}/home",
    ]
    assert sample.main(words) == 0, capfd.readouterr().err
    assert Image.open(place / "drawn.png").size == (3 * 68 + 4, 2 * 68 + 4)
    assert sample.main([*words, f"codec_source={place}/nowhere"]) == 2
    assert "codec.source" in capfd.readouterr().err

    (report,) = evaluate_checkpoints(
        CheckpointEvaluationConfig(
            checkpoint=str(checkpoint),
            samples=10,
            batch=5,
            home=f"{place}/home",
            data=RealImagesConfig(prefix=f"{place}/digits"),
        ),
        tell=print,
    )
    assert report.distances[0].frechet > 0
