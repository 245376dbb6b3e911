"""What of a data set reaches training, and what reaches evaluation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.contract import WorkerContext
from models.codec import IdentityCodec
from models.pyramid import merge
from pipelines.augment import AugmentConfig
from pipelines.encoded import as_png
from pipelines.errors import BadDataError
from pipelines.ingest.digits import ensure_digits
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.loading.loader import Cursor
from tests.support.configuration import configuration
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.data.loading import training_loader
from trainer.data.splits import open_split
from trainer.evaluation.real_images import RealImages, check_held, check_measurable

ALONE = WorkerContext(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    attempt=0,
    device="cpu",
    stop_requested=lambda: False,
    report=lambda _: None,
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
    real = torch.cat([pictures for pictures, _ in RealImages(job, "train", ALONE)])
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
    again = torch.cat([pictures for pictures, _ in RealImages(plain, "train", ALONE)])
    assert torch.equal(real, again)


def spoiled(place: Path, *, bad: dict[int, bytes], count: int = 12) -> list[bytes]:
    """Write held-out images in shards of two, some of which are no pictures."""
    images = [
        bad.get(number) or as_png(np.full((8, 8, 1), 20 * number, np.uint8))
        for number in range(count)
    ]
    for split in ("train", "test"):
        write_dataset(
            [LabelledImage(image, number % 10) for number, image in enumerate(images)],
            f"{place}/{split}",
            shard_bytes=2 * max(map(len, images)) + 100,
        )
    return images


def test_real_images_that_cannot_be_used_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What shows at once, and what only the decoder finds.
    whole = as_png(np.arange(64, dtype=np.uint8).reshape(8, 8, 1))
    spoiled(tmp_path / "data", bad={3: b"<html>", 8: whole[: len(whole) // 2]})
    job = job_of(tmp_path / "data", tmp_path, AugmentConfig())
    found = RealImages(job, "test", ALONE)
    labels = torch.cat([labels for _, labels in found])
    assert labels.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 0, 1]
    assert len(found) == 12
    named = {record.args[0] for record in caplog.records if record.args}
    assert named == {3, 8}


@pytest.mark.slow
def test_real_images_of_lost_shards_are_left_out_as_far_as_allowed(tmp_path: Path) -> None:
    spoiled(tmp_path / "data", bad={})
    shards = sorted((tmp_path / "data" / "test").glob("*.mds"))
    assert len(shards) > 2
    shards[1].unlink()
    job = job_of(tmp_path / "data", tmp_path, AugmentConfig())
    found = RealImages(job, "test", ALONE)
    left = torch.cat([labels for _, labels in found])
    assert 0 < len(left) < len(found)
    none_allowed = dataclasses.replace(
        job, loader=dataclasses.replace(job.loader, max_bad_fraction=0.0)
    )
    with pytest.raises(BadDataError, match="max_bad_fraction"):
        list(RealImages(none_allowed, "test", ALONE))


@pytest.mark.parametrize("bad", [{0: b"<html>"}, {0: b"<html>", 1: b"<p>"}])
def test_too_few_usable_real_images_are_an_error(tmp_path: Path, bad: dict[int, bytes]) -> None:
    spoiled(tmp_path / "data", bad=bad, count=2)
    found = RealImages(job_of(tmp_path / "data", tmp_path, AugmentConfig()), "test", ALONE)
    with pytest.raises(BadDataError, match=f"Of 2 images of the split test only {2 - len(bad)} "):
        list(found)


@pytest.mark.parametrize(("count", "told"), [(1, True), (3, True), (4, False)])
def test_few_held_out_images_are_told_before_a_run(tmp_path: Path, count: int, told: bool) -> None:
    spoiled(tmp_path / "data", bad={}, count=count)
    notes: list[str] = []
    check_measurable(job_of(tmp_path / "data", tmp_path, AugmentConfig()), report=notes.append)
    assert bool(notes) == told
    assert not told or f"has {count} held-out image" in notes[0]
    assert not told or "figures need 4: no figure is measured at the end" in notes[0]


@pytest.mark.slow
def test_too_large_images_are_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(tmp_path / "data", bad={})
    job = job_of(tmp_path / "data", tmp_path, AugmentConfig())
    check_measurable(job, report=print)
    monkeypatch.setattr("trainer.evaluation.real_images._MAX_HELD_BYTES", 12 * 64 * 4 - 1)
    with pytest.raises(ConfigError, match=r"eval\.classifier=true holds all 12 .*3\.0 KiB"):
        check_measurable(job, report=print)
    with pytest.raises(ConfigError, match=r"learned_conv .* holds all 12"):
        check_held(job, ["random_conv", "learned_conv"], classifier=False)
    check_held(job, ["random_conv", "inception"], classifier=False)
