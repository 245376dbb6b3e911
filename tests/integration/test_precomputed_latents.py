"""A whole job on precomputed latents: encoded once, trained on, decoded to be seen, resumed."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.ingest.digits import ensure_digits
from tests.support.autoencoder import saved_autoencoder
from tests.support.latent_job import LatentJobs
from trainer.cli import sample
from trainer.cli.latents import main as encode
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig, RealImagesConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, empty_tracker) -> LatentJobs:
    """Digits enlarged to 32 pixels; their latents are 4 x 4 with 4 channels."""
    place = tmp_path_factory.mktemp("precomputed")
    ensure_digits(str(place / "digits"))
    saved_autoencoder(place / "autoencoder", channels=3)
    words = [place / "digits", place / "latents", "--autoencoder", place / "autoencoder"]
    assert encode([*map(str, words), "--image-size", "32", "--batch", "64"]) == 0
    (place / "home").mkdir()
    shutil.copy(empty_tracker, place / "home")
    return LatentJobs(
        place=place,
        data="latents",
        images=1600,  # more than an epoch
        settings=(
            "data.space=latent",
            "data.image_size=4",
            "data.channels=4",
            "data.augment.flip=true",
        ),
    )


@pytest.fixture(scope="module")
def whole(jobs) -> str:
    """A run that nothing interrupted."""
    assert jobs.launch("run=whole") == 0
    return "whole"


def test_samples_and_grids_are_pictures_of_the_size_of_the_images(jobs, whole):
    folder = jobs.evaluation(whole)
    samples = np.load(folder / "samples.npz")
    assert samples["arr_0"].shape == (20, 32, 32, 3)
    assert len(np.unique(samples["arr_0"])) > 2
    grid = Image.open(io.BytesIO((folder / "grid.png").read_bytes()))
    assert grid.width % (32 + 4) == 4
    figures = jobs.report(whole)
    assert figures["frechet"] > figures["real"]["frechet"] > 0


def test_a_resumed_run_is_the_same_to_the_bit_wherever_latents_and_autoencoder_are(jobs, whole):
    latents = shutil.copytree(jobs.place / "latents", jobs.place / "moved_latents")
    autoencoder = shutil.copytree(jobs.place / "autoencoder", jobs.place / "moved_autoencoder")
    half = jobs.checkpoint(whole, 800)
    moved = (f"data.prefix={latents}", f"codec.source={autoencoder}")
    assert jobs.launch("run=resumed", f"resume={half}", "loader.decoder=dali", *moved) == 0
    jobs.assert_same_to_the_bit(whole, "resumed")


def test_latents_of_another_autoencoder_end_before_anything_starts(jobs, capfd):
    saved_autoencoder(jobs.place / "other", channels=3, seed=1)
    assert jobs.launch("run=never", f"codec.source={jobs.place}/other") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "made by another autoencoder" in error
    assert not (jobs.run("never") / "checkpoints").exists()


def test_a_checkpoint_is_sampled_and_measured_in_pixels(jobs, whole, capfd):
    place, checkpoint = jobs.place, jobs.checkpoint(whole, 1600)
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
            report=print,
        )
        assert found.real_images == 359
        return found.distances[0].frechet

    images = shutil.copytree(place / "digits", place / "moved_digits")
    assert measured("one") == measured("two", images_prefix=str(images)) > 0
