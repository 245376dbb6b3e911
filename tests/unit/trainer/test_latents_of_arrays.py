"""Latents that another program computed, as a run's data."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.loading.loader import Cursor
from pipelines.shards import ShardedDataset
from tests.support.autoencoder import saved_autoencoder
from tests.unit.pipelines import pictures
from tests.unit.trainer.test_latent_data import ALONE, checked, codec_of, job_of, refused
from trainer.cli.latents import main as ingest
from trainer.data.loading import training_loader
from trainer.data.splits import open_images, open_split
from trainer.evaluation.real_images import RealImages


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    saved_autoencoder(folder / "autoencoder", channels=3)
    numbers = np.abs(np.random.default_rng(0).standard_normal((40, 8, 4, 4), dtype=np.float32))
    for number, array in enumerate(numbers):
        path = folder / "arrays" / str(number % 10) / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    for split, count in (("train", 8), ("test", 5)):
        images = [LabelledImage(pictures.png(32, 32, seed=i), i % 10) for i in range(count)]
        write_dataset(images, str(folder / "images" / split))
    words = [folder / "arrays", folder / "latents", "--autoencoder", folder / "autoencoder"]
    options = ["--arrays", "mean-std", "--hold-out", "0.25", "--workers", "1"]
    assert ingest([*map(str, words), *options]) == 0
    return folder


def test_a_run_must_name_images_before_it_starts(place: Path) -> None:
    message = refused(job_of(place))
    assert f"nobody knows the images of the latents at {place}/latents/test" in message
    assert f"arrays at {place}/arrays" in message
    assert "set data.images_prefix" in message
    message = refused(job_of(place, f"data.images_prefix={place / 'nowhere'}"))
    assert f"are not at {place}/nowhere/test" in message


def test_a_run_that_names_images_reads_the_latents_and_is_compared_with_them(place: Path) -> None:
    job = job_of(place, f"data.images_prefix={place / 'images'}")
    checked(job)
    images = ShardedDataset(str(place / "images" / "test"))
    assert open_images(job, "test").digest == images.digest
    (pictures_of_test,) = RealImages(job, "test", ALONE)
    assert pictures_of_test[0].shape == (5, 3, 32, 32)
    split = open_split(job, "train")
    assert len(split) == 30
    with training_loader(job, split, ALONE, codec=codec_of(job)) as loader:
        batch, _ = next(loader.batches(Cursor()))
    assert batch.labels.shape == (8,)


def test_other_latents_are_refused_as_ever(place: Path, tmp_path: Path) -> None:
    images = f"data.images_prefix={place / 'images'}"
    other = saved_autoencoder(tmp_path / "other", channels=3, seed=1)
    assert "made by another autoencoder" in refused(job_of(place, images, f"codec.source={other}"))
    assert "data.augment.flip=true needs" in refused(
        job_of(place, images, "data.augment.flip=true")
    )
