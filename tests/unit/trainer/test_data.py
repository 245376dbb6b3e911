"""What of a data set reaches training, and what reaches evaluation."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cluster.contract import WorkerContext
from models.codec import IdentityCodec
from models.pyramid import merge
from pipelines.batch import Cursor
from pipelines.ingest.digits import ensure_digits
from pipelines.view import AugmentConfig
from tests.support.configuration import configuration
from trainer.data import open_split, real_images, training_loader
from trainer.schema import JobConfig

ALONE = WorkerContext(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    attempt=0,
    device="cpu",
    stop_requested=lambda: False,
    tell=lambda _: None,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("digits")
    ensure_digits(str(prefix))
    return prefix


def job_of(digits: Path, home: Path, augment: AugmentConfig) -> JobConfig:
    job = configuration("+exp=digits", f"data.prefix={digits}", f"home={home}")
    return dataclasses.replace(job, data=dataclasses.replace(job.data, augment=augment))


def test_training_images_are_flipped_and_real_ones_are_not(digits: Path, tmp_path: Path) -> None:
    job = job_of(digits, tmp_path, AugmentConfig(flip=True))
    real = torch.cat([pictures for pictures, _ in real_images(job, "train", ALONE)])
    images = open_split(job, "train")
    with training_loader(job, images, ALONE, codec=IdentityCodec()) as loader:
        batch, _ = next(loader.batches(Cursor()))
    flipped = 0
    for image, sample_id in zip(merge(batch.bands), batch.sample_ids.tolist(), strict=True):
        stored = real[sample_id]
        as_it_is = torch.allclose(image, stored, atol=1e-6)
        mirrored = torch.allclose(image, stored.flip(-1), atol=1e-6)
        assert as_it_is or mirrored
        flipped += mirrored and not as_it_is
    # Of 128 images, half but for five standard deviations.
    assert abs(flipped - 64) < 5 * (128 * 0.25) ** 0.5

    plain = job_of(digits, tmp_path, AugmentConfig())
    again = torch.cat([pictures for pictures, _ in real_images(plain, "train", ALONE)])
    assert torch.equal(real, again)
