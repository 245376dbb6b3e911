"""Precomputed latents as a run's data: what reaches training, and what is refused before."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.contract import WorkerContext
from models.codec import AutoencoderKlCodec
from models.pyramid import merge
from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import make_decoder
from pipelines.documents import seal, unseal
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.latent_record import RECORD_NAME
from pipelines.loading.loader import Cursor
from pipelines.shards import ShardedDataset
from tests.support.autoencoder import saved_autoencoder
from tests.support.configuration import configuration
from tests.unit.pipelines import pictures
from trainer.autoencoder.codec import load_codec
from trainer.autoencoder.config import codec_digest
from trainer.autoencoder.files import AutoencoderError
from trainer.cli.latents import main as encode
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError
from trainer.data.loading import training_loader
from trainer.data.splits import check_latents, open_images, open_split, with_classes
from trainer.evaluation.real_images import RealImages
from trainer.training.validate import validate

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
COUNTS = {"train": 24, "test": 6}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent_data")
    saved_autoencoder(folder / "autoencoder", channels=3)
    for split, count in COUNTS.items():
        images = [LabelledImage(pictures.png(32, 32, seed=i), i % 10) for i in range(count)]
        write_dataset(images, str(folder / "images" / split))
    encoded(folder, "latents")
    encoded(folder, "one_view", "--no-flips")
    return folder


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """Latents of its own for each test, to be damaged at will; their images stay where they are."""
    for name in ("latents", "one_view", "autoencoder"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path


def encoded(folder: Path, name: str, *more: str) -> None:
    words = [folder / "images", folder / name, "--autoencoder", folder / "autoencoder"]
    assert encode([*map(str, words), "--image-size", "32", "--dtype", "float32", *more]) == 0


def job_of(place: Path, *overrides: str, name: str = "latents") -> JobConfig:
    job = configuration(
        "+exp=digits",
        "data.prepare=none",
        "data.space=latent",
        "data.image_size=4",
        "data.channels=4",
        f"data.prefix={place / name}",
        f"home={place / 'home'}",
        "codec.kind=autoencoder_kl",
        f"codec.source={place / 'autoencoder'}",
        "train.global_batch=8",
        "eval.classifier=false",
        *overrides,
    )
    validate(job)
    return job


def checked(job: JobConfig) -> None:
    """Do what the checks before the start do with the data."""
    digest = codec_digest(job.codec, cache=Path(job.home), store=job.store, image_channels=3)
    for split in COUNTS:
        open_split(job, split)
    check_latents(job, codec_digest=digest)


def codec_of(job: JobConfig) -> AutoencoderKlCodec:
    codec = load_codec(
        job.codec, cache=Path(job.home), store=job.store, device=torch.device("cpu")
    ).codec
    assert isinstance(codec, AutoencoderKlCodec)
    return codec


def refused(job: JobConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(job)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_training_reads_what_the_codec_would_encode(place: Path, pristine: Path) -> None:
    job = job_of(place, "codec.posterior=mean", "codec.scale=0.5", "codec.shift=0.25")
    checked(job)
    codec = codec_of(job)
    images = ShardedDataset(str(pristine / "images" / "train"))
    decode = make_decoder("dali", DecodeConfig(image_size=32, scales=1), device="cpu")
    (whole,) = decode([images.read(number).data for number in range(COUNTS["train"])])
    wanted = codec.encode(whole, torch.empty(len(whole), 0))
    with training_loader(job, open_split(job, "train"), ALONE, codec=codec) as loader:
        batches = loader.batches(Cursor())
        for _ in range(3):
            batch, _ = next(batches)
            latents, ids = merge(batch.bands), batch.sample_ids.numpy()
            torch.testing.assert_close(latents, wanted[ids], rtol=0, atol=1e-5)
            assert [images.read(number).label for number in ids] == batch.labels.tolist()


def test_half_of_the_latents_are_those_of_mirrored_images(place: Path, pristine: Path) -> None:
    job = job_of(place, "codec.posterior=mean", "data.augment.flip=true")
    checked(job)
    codec = codec_of(job)
    images = torch.cat([pictures for pictures, _ in RealImages(job, "train", ALONE)])
    none = torch.empty(len(images), 0)
    plain, mirrored = codec.encode(images, none), codec.encode(images.flip(-1), none)
    shown = []
    with training_loader(job, open_split(job, "train"), ALONE, codec=codec) as loader:
        batches = loader.batches(Cursor())
        for _ in range(30):
            batch, _ = next(batches)
            for latent, number in zip(merge(batch.bands), batch.sample_ids.tolist(), strict=True):
                views = [torch.allclose(latent, v[number], atol=1e-5) for v in (plain, mirrored)]
                assert sum(views) == 1
                shown.append(views[1])
    assert abs(np.mean(shown) - 0.5) < 5 * 0.5 / len(shown) ** 0.5


def test_real_images_are_those_the_latents_were_made_of(place: Path, pristine: Path) -> None:
    job = job_of(place)
    images, labels = (
        torch.cat(parts) for parts in zip(*RealImages(job, "test", ALONE), strict=True)
    )
    assert images.shape == (COUNTS["test"], 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    first = np.asarray(pictures.photo(32, 32, seed=0)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(images[0], first, atol=1e-5)
    wanted = ShardedDataset(str(pristine / "images" / "test")).digest
    assert open_images(job, "test").digest == wanted
    moved = shutil.copytree(pristine / "images", place / "moved")
    assert open_images(job_of(place, f"data.images_prefix={moved}"), "test").digest == wanted


def edit(place: Path, **changes: object) -> None:
    file = place / "latents" / "train" / RECORD_NAME
    body = {**unseal(json.loads(file.read_text())), **changes}
    file.write_text(json.dumps(seal(body)))


def test_another_autoencoder_is_refused(place: Path) -> None:
    saved_autoencoder(place / "other", channels=3, seed=1)
    message = refused(job_of(place, f"codec.source={place / 'other'}"))
    assert "made by another autoencoder" in message
    assert "codec.source" in message


def test_an_autoencoder_of_grey_images_is_refused(place: Path) -> None:
    saved_autoencoder(place / "grey", channels=1)
    with pytest.raises(AutoencoderError, match="3 channels"):
        checked(job_of(place, f"codec.source={place / 'grey'}"))


def test_images_and_latents_are_not_taken_for_each_other(place: Path, pristine: Path) -> None:
    message = refused(job_of(place, f"data.prefix={pristine / 'images'}"))
    assert "holds images, and data.space=latent asks for latents" in message
    assert "data.space=pixel" in message
    pixels = ("data.space=pixel", "data.channels=3", "data.image_size=32")
    message = refused(job_of(place, *pixels))
    assert "holds latents, and data.space=pixel asks for images" in message


def test_latents_of_another_shape_are_refused(place: Path) -> None:
    message = refused(job_of(place, "data.image_size=8"))
    assert "4 channels and 4 x 4 elements" in message
    assert "data.image_size=4" in message


def test_mirrored_latents_must_be_there(place: Path) -> None:
    checked(job_of(place, name="one_view"))
    message = refused(job_of(place, "data.augment.flip=true", name="one_view"))
    assert "data.augment.flip=true needs latents of mirrored images" in message
    assert "--no-flips" in message


@pytest.mark.parametrize(
    "change", [{"samples": 23}, {"dtype": "float16"}, {"views": 1}, {"image_size": 64}]
)
def test_a_record_of_other_latents_is_refused(place: Path, change: dict[str, object]) -> None:
    edit(place, **change)
    assert "and the index beside it of 24" in refused(job_of(place))


def test_classes_without_names_must_be_counted_by_hand(place: Path) -> None:
    job = job_of(place)
    uncounted = dataclasses.replace(job, data=dataclasses.replace(job.data, classes=0))
    with pytest.raises(ConfigError, match=r"data\.classes=0 .* set data\.classes to the number"):
        with_classes(uncounted)


def test_a_missing_record_is_refused(place: Path) -> None:
    (place / "latents" / "test" / RECORD_NAME).unlink()
    with pytest.raises(ValueError, match=r"no latents\.json at .*pipelines\.ingest\.latents"):
        checked(job_of(place))


def test_images_that_are_gone_or_others_are_found_out_before_the_start(
    place: Path, pristine: Path
) -> None:
    message = refused(job_of(place, f"data.images_prefix={place / 'nowhere'}"))
    assert f"are not at {place}/nowhere/test" in message
    assert "data.images_prefix" in message
    shutil.copytree(pristine / "images" / "train", place / "swapped" / "test")
    job = job_of(place, f"data.images_prefix={place / 'swapped'}")
    assert "made of other images than those at" in refused(job)
    # The training images are needed only by what learns from them.
    shutil.copytree(pristine / "images" / "test", place / "held_out" / "test")
    job = job_of(place, f"data.images_prefix={place / 'held_out'}")
    checked(job)
    learning = dataclasses.replace(job, eval=dataclasses.replace(job.eval, classifier=True))
    assert f"are not at {place}/held_out/train" in refused(learning)


def test_streams_must_be_stored_alike(place: Path) -> None:
    def both(*names: str) -> JobConfig:
        streams = ",".join(f"{{prefix:{place / name}}}" for name in names)
        return job_of(place, f"data.streams=[{streams}]", "data.prefix=null")

    message = refused(both("latents", "one_view"))
    assert "stored in another way" in message
    shutil.copytree(place / "latents", place / "copy")
    job = both("latents", "copy")
    checked(job)
    assert len(open_split(job, "train")) == 2 * COUNTS["train"]
    assert len(open_images(job, "test")) == 2 * COUNTS["test"]
    job = dataclasses.replace(job, data=dataclasses.replace(job.data, images_prefix="x"))
    with pytest.raises(ConfigError, match=r"data\.images_prefix=x .*data\.streams has 2"):
        validate(job)
