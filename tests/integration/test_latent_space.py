"""A whole job in latent space: encoded as it trains, decoded to be seen, resumed to the bit."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.ingest.digits import ensure_digits
from tests.support.autoencoder import saved_autoencoder
from tests.support.latent_job import LatentJobs
from trainer.cli import sample
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig, RealImagesConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, empty_tracker) -> LatentJobs:
    """Digits enlarged to 64 pixels; their latents are 8 x 8 with 4 channels."""
    place = tmp_path_factory.mktemp("latent")
    ensure_digits(str(place / "digits"))
    saved_autoencoder(place / "autoencoder")
    (place / "home").mkdir()
    shutil.copy(empty_tracker, place / "home")
    return LatentJobs(place=place, data="digits", images=128, settings=("data.image_size=64",))


@pytest.fixture(scope="module")
def whole(jobs) -> str:
    """A run that nothing interrupted."""
    assert jobs.launch("run=whole") == 0
    return "whole"


def test_samples_and_grids_are_pictures_of_the_size_of_the_images(jobs, whole):
    folder = jobs.evaluation(whole)
    samples = np.load(folder / "samples.npz")
    assert samples["arr_0"].shape == (20, 64, 64, 1)
    assert len(np.unique(samples["arr_0"])) > 2
    grid = Image.open(io.BytesIO((folder / "grid.png").read_bytes()))
    assert grid.width % (64 + 4) == 4


def test_a_resumed_run_is_the_same_to_the_bit_wherever_the_autoencoder_is(jobs, whole):
    moved = shutil.copytree(jobs.place / "autoencoder", jobs.place / "moved")
    half = jobs.checkpoint(whole, 64)
    assert jobs.launch("run=resumed", f"resume={half}", f"codec.source={moved}") == 0
    jobs.assert_same_to_the_bit(whole, "resumed")


def test_another_autoencoder_is_another_run(jobs, whole, capfd):
    saved_autoencoder(jobs.place / "other", seed=1)
    assert jobs.launch(f"run={whole}", f"codec.source={jobs.place}/other") == 2
    assert "autoencoder.sha256" in capfd.readouterr().err


def test_a_missing_autoencoder_is_found_out_before_anything_starts(jobs, capfd):
    assert jobs.launch("run=never", f"codec.source={jobs.place}/nowhere") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{jobs.place}/nowhere" in error
    assert not (jobs.run("never") / "checkpoints").exists()


def test_a_checkpoint_is_sampled_and_measured_in_pixels(jobs, whole, capfd):
    place, checkpoint = jobs.place, jobs.checkpoint(whole, 128)
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
        report=print,
    )
    assert report.distances[0].frechet > 0
