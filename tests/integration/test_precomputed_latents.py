"""A whole job on precomputed latents: encoded once, trained on, decoded to be seen, resumed."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.ingest.digits import ensure_digits
from pipelines.ingest.latents.__main__ import main as encode
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

# Digits enlarged to 32 pixels; their latents are 4 x 4 with 4 channels.
JOB = (
    "+exp=digits",
    "data.prepare=none",
    "data.space=latent",
    "data.image_size=4",
    "data.channels=4",
    "data.augment.flip=true",
    "cluster.backend=local",
    "cluster.workers=1",
    "engine=plain",
    "model.depth=1",
    "model.width=16",
    "model.patch_size=2",
    "train.global_batch=32",
    "train.total_images=1600",  # more than an epoch
    "checkpoint.interval_images=800",
    "runtime.log_interval_images=800",
    "eval.samples=20",
    "eval.batch=8",
    "eval.sampler.steps=2",
    "eval.classifier=false",
    "eval.grid_interval_images=800",
    "codec.kind=autoencoder_kl",
)
END = "000000001600"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("precomputed")
    ensure_digits(str(folder / "digits"))
    saved_autoencoder(folder / "autoencoder", channels=3)
    words = [folder / "digits", folder / "latents", "--autoencoder", folder / "autoencoder"]
    assert encode([*map(str, words), "--image-size", "32", "--batch", "64"]) == 0
    return folder


@pytest.fixture(scope="module")
def launch(place):
    def run(*overrides: str) -> int:
        return main(
            [
                *JOB,
                f"home={place}/home",
                f"data.prefix={place}/latents",
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


def report(place: Path, run: str) -> dict:
    folder = place / "home" / "store" / "runs" / run / "evaluation" / END
    return json.loads((folder / "report.json").read_text())


def test_samples_and_grids_are_pictures_of_the_size_of_the_images(place, whole):
    samples = np.load(whole / "evaluation" / END / "samples.npz")
    assert samples["arr_0"].shape == (20, 32, 32, 3)
    assert len(np.unique(samples["arr_0"])) > 2
    grid = Image.open(io.BytesIO((whole / "evaluation" / END / "grid.png").read_bytes()))
    assert grid.width % (32 + 4) == 4
    figures = report(place, "whole")
    assert figures["frechet"] > figures["frechet_real_halves"] > 0


def test_a_resumed_run_is_the_same_to_the_bit_wherever_latents_and_autoencoder_are(
    place, whole, launch
):
    latents = shutil.copytree(place / "latents", place / "moved_latents")
    autoencoder = shutil.copytree(place / "autoencoder", place / "moved_autoencoder")
    half = whole / "checkpoints" / "000000000800"
    moved = (f"data.prefix={latents}", f"codec.source={autoencoder}")
    assert launch("run=resumed", f"resume={half}", "loader.decoder=dali", *moved) == 0
    store = str(place / "home" / "store")
    before, after = final_state(store, "whole"), final_state(store, "resumed")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert report(place, "whole")["frechet"] == report(place, "resumed")["frechet"]


def test_latents_of_another_autoencoder_end_before_anything_starts(place, whole, launch, capfd):
    saved_autoencoder(place / "other", channels=3, seed=1)
    assert launch("run=never", f"codec.source={place}/other") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "made by another autoencoder" in error
    assert not (place / "home" / "store" / "runs" / "never" / "checkpoints").exists()


def test_a_checkpoint_is_sampled_and_measured_in_pixels(place, whole, capfd):
    checkpoint = whole / "checkpoints" / END
    words = [
        f"checkpoint={checkpoint}",
        f"output={place}/drawn.png",
        "classes=[1,2]",
        "columns=3",
        "sampler.steps=2",
        f"home={place}/home",
    ]
    assert sample.main(words) == 0, capfd.readouterr().err
    assert Image.open(place / "drawn.png").size == (3 * 36 + 4, 2 * 36 + 4)

    def measured(name: str, **data: str) -> float:
        (found,) = evaluate_checkpoints(
            CheckpointEvaluationConfig(
                checkpoint=str(checkpoint),
                samples=10,
                batch=5,
                home=f"{place}/home",
                output=f"{place}/{name}",
                data=RealImagesConfig(prefix=f"{place}/latents", **data),
            ),
            tell=print,
        )
        assert found.real_images == 359
        return found.distances[0].frechet

    images = shutil.copytree(place / "digits", place / "moved_digits")
    assert measured("one") == measured("two", images_prefix=str(images)) > 0
