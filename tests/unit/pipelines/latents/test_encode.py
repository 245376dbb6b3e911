"""The command that encodes images: what it stores, and how it goes on after an interruption."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec import AutoencoderKlCodec
from models.pyramid import split
from pipelines.augment import SampleKey
from pipelines.decode.contract import LatentDecodeConfig
from pipelines.decode.make import make_decoder
from pipelines.ingest.__main__ import main as ingest_command
from pipelines.ingest.about import read_about
from pipelines.ingest.latent_config import Encoder
from pipelines.latent_record import read_latent_record
from pipelines.shards import ShardedDataset
from tests.support.s3_server import S3Server
from tests.unit.pipelines import pictures
from tests.unit.pipelines.latents.encoding import (
    IMAGES,
    SETTINGS,
    SIZE,
    SMALL,
    by_hand,
    command,
    encode,
    files_in,
    stored,
)
from trainer.autoencoder.codec import open_codec
from trainer.autoencoder.files import find_autoencoder
from trainer.cli.latents import main
from trainer.storage.store import StoreConfig


def test_moments_of_both_views_are_those_of_the_codec_to_the_bit(
    place: Path, encoded: Path, codec: AutoencoderKlCodec
) -> None:
    wanted = by_hand(place, codec, "dali")
    assert wanted.shape == (IMAGES, 2, 2, 4, 4, 4)
    assert np.array_equal(stored(encoded / "train"), wanted.numpy())
    # A mirrored latent is not the latent of the mirrored image.
    assert not np.allclose(wanted[:, 0, 0].flip(-1), wanted[:, 1, 0], atol=1e-3)
    latents, images = (
        ShardedDataset(str(folder / "train")) for folder in (encoded, place / "images")
    )
    labels = [[data.read(i).label for i in range(IMAGES)] for data in (latents, images)]
    assert labels[0] == labels[1]
    assert len(ShardedDataset(str(encoded / "test"))) == 4


def test_the_record_tells_what_the_latents_are(
    place: Path, encoded: Path, encoder: Encoder
) -> None:
    record = read_latent_record(str(encoded / "train"))
    images = ShardedDataset(str(place / "images" / "train"))
    latents = ShardedDataset(str(encoded / "train"))
    assert record.autoencoder == str(place / "autoencoder")
    assert record.autoencoder_sha256 == encoder.sha256
    assert (record.factor, record.channels, record.image_size) == (8, 4, SIZE)
    assert (record.scale, record.shift) == (0.18215, 0.0)
    assert record.format == latents.latents
    assert (record.samples, record.skipped) == (IMAGES, ())
    assert record.source == str(place / "images" / "train")
    assert record.source_sha256 == images.digest
    assert ingest_command(["verify", str(encoded / "train")]) == 0


def test_half_precision_and_one_view_and_the_other_decoder(
    place: Path, tmp_path: Path, codec: AutoencoderKlCodec
) -> None:
    options = ("--no-flips", "--decoder", "pillow", "--splits", "train")
    assert command(place, tmp_path / "latents", *options) == 0
    wanted = by_hand(place, codec, "pillow").numpy().astype(np.float16)
    assert np.array_equal(stored(tmp_path / "latents" / "train"), wanted[:, :1])
    assert not (tmp_path / "latents" / "test").exists()


def test_bf16_is_the_codecs_bf16(place: Path, tmp_path: Path, codec: AutoencoderKlCodec) -> None:
    options = ("--precision", "bf16", "--dtype", "float32", "--splits", "train")
    assert command(place, tmp_path / "latents", *options) == 0
    files = find_autoencoder(str(place / "autoencoder"), cache=place, store=StoreConfig())
    rounded = open_codec(files, device=torch.device("cpu"), encode_precision="bf16")
    got = stored(tmp_path / "latents" / "train")
    assert np.array_equal(got, by_hand(place, rounded, "dali").numpy())
    assert not np.array_equal(got, by_hand(place, codec, "dali").numpy())
    assert read_latent_record(str(tmp_path / "latents" / "train")).encode_precision == "bf16"


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_what_training_reads_is_drawn_from_the_posterior_of_either_view(
    encoded: Path, decoder: str
) -> None:
    dataset = ShardedDataset(str(encoded / "train"))
    assert dataset.latents is not None
    config = LatentDecodeConfig(
        format=dataset.latents, scales=1, scale=0.5, shift=0.25, flip=True, decode_threads=1
    )
    decode = make_decoder(decoder, config, device="cpu")
    samples = [dataset.read(number) for number in range(IMAGES)]
    data, moments = [sample.data for sample in samples], stored(encoded / "train")
    scores, mirrored = [], 0
    for epoch in range(60):
        keys = [SampleKey(9, epoch, sample.sample_id) for sample in samples]
        (latents,) = decode(data, keys)
        drawn = latents.numpy() / 0.5 + 0.25
        errors = (drawn[:, None] - moments[:, :, 0]) / moments[:, :, 1]
        # The deviation is small beside the difference of the views, so the nearer one was shown.
        size = np.square(errors).mean(axis=(2, 3, 4))
        scores.append(errors[np.arange(IMAGES), size.argmin(axis=1)])
        mirrored += int(size.argmin(axis=1).sum())
    normals = np.stack(scores).astype(np.float64)
    total = 60 * IMAGES
    assert abs(mirrored - total / 2) < 5 * (total / 4) ** 0.5
    assert abs(normals.mean()) < 5 / normals.size**0.5
    assert abs(normals.var() - 1) < 5 * (2 / normals.size) ** 0.5
    # Each element of each image has the stored mean and deviation, too.
    assert np.abs(normals.mean(axis=0)).max() * 60**0.5 < 6
    assert abs((normals.mean(axis=0) * 60**0.5).std() - 1) < 0.1


def test_statistics_of_the_bands_are_those_of_the_latents(
    place: Path, tmp_path: Path, encoder: Encoder
) -> None:
    encode(place / "images" / "train", tmp_path / "latents", encoder)
    record = read_latent_record(str(tmp_path / "latents"))
    moments = stored(tmp_path / "latents")
    drawn = []
    for view in range(2):
        for number, (mean, std) in enumerate(moments[:, view]):
            normals = SampleKey(0, view, number).normals(mean.size).reshape(mean.shape)
            drawn.append((mean + std * normals - encoder.shift) * encoder.scale)
    latents = torch.from_numpy(np.stack(drawn))
    assert sorted(record.bands) == [1, 2, 3]
    for scales, bands in record.bands.items():
        for band, statistics in zip(split(latents.double(), scales), bands, strict=True):
            assert statistics.mean == pytest.approx(band.mean().item(), abs=1e-7)
            assert statistics.std == pytest.approx(band.std(correction=0).item(), rel=1e-6)


@pytest.mark.slow
def test_a_killed_encoding_goes_on_where_it_stopped_by_any_number_of_processes(
    place: Path, tmp_path: Path, encoder: Encoder
) -> None:
    whole = tmp_path / "whole"
    encode(place / "images" / "train", whole, encoder)
    source, target = str(place / "images"), str(tmp_path / "out")
    options = ["--autoencoder", str(place / "autoencoder"), "--image-size", str(SIZE)]
    options += ["--batch", "3", "--dtype", "float32", "--splits", "train"]
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_AN_ENCODING, source, target, *options], start_new_session=True
    )
    work = tmp_path / "out" / ".train.building"
    while len(list(work.glob("*.record"))) < 2:
        assert process.poll() is None, "the encoding ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    recorded = {path.stem for path in work.glob("*.record")}
    kept = {name: (work / f"{name}.mds").stat().st_mtime_ns for name in recorded}
    assert len(recorded) == 2  # of 5, so that two processes have something to do
    assert not (tmp_path / "out" / "train").exists()

    two = dataclasses.replace(SMALL, workers=2)
    notes = encode(place / "images" / "train", tmp_path / "out" / "train", encoder, two)
    assert "23 images (100%), 0 skipped" in notes[-1]
    after, before = files_in(tmp_path / "out" / "train"), files_in(whole)
    assert sorted(after) == sorted(before)
    for name, content in before.items():
        assert after[name] == content, name
    for name, written_at in kept.items():
        resumed = tmp_path / "out" / "train" / f"{name}.mds"
        assert resumed.stat().st_mtime_ns == written_at
    again = encode(place / "images" / "train", tmp_path / "out" / "train", encoder, two)
    assert again == ["complete, nothing to do"]


# The command with small shards, that stops after two of them, to be killed.
HALF_AN_ENCODING = """
import itertools, signal, sys
from pipelines.ingest import encode, plan
from pipelines.ingest.latents.__main__ import main
write = plan.write_shards
def two(parts, *arguments, **options):
    yield from itertools.islice(write(parts, *arguments, **options), 2)
    signal.pause()
plan.write_shards = two
cut = encode.cut
encode.cut = lambda samples, shard_bytes, size: cut(samples, shard_bytes=5 * 1024, size=size)
sys.exit(main(sys.argv[1:]))
"""


def test_classes_come_along_and_are_counted(tmp_path: Path, encoder: Encoder) -> None:
    for name, count in (("ant", 3), ("bee", 2)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(count):
            path = tmp_path / "pictures" / name / f"{number}.png"
            path.write_bytes(pictures.png(seed=number + 10 * count))
    folder, images = str(tmp_path / "pictures"), str(tmp_path / "images")
    assert ingest_command(["image-folder", folder, images, "--workers", "1"]) == 0
    encode(tmp_path / "images" / "train", tmp_path / "latents", encoder)
    about = read_about(str(tmp_path / "latents"))
    assert about is not None
    assert about.classes == ("ant", "bee")
    assert about.images_per_class == (3, 2)
    assert ingest_command(["verify", str(tmp_path / "latents")]) == 0


@pytest.mark.slow
def test_everything_may_be_in_a_store(
    place: Path,
    encoded: Path,
    tmp_path: Path,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.make_bucket("latents")
    for file in sorted(place.rglob("*")):
        if file.is_file() and file.relative_to(place).parts[0] in ("images", "autoencoder"):
            s3.client.upload_file(str(file), "latents", file.relative_to(place).as_posix())
    arguments = [f"{bucket}/images", f"{bucket}/encoded", "--autoencoder", f"{bucket}/autoencoder"]
    places = ["--cache", str(tmp_path / "cache"), "--work-dir", str(tmp_path / "work")]
    assert main([*arguments, *SETTINGS, "--dtype", "float32", *places]) == 0
    for name in ("train", "test"):
        prefix = f"{bucket}/encoded/{name}"
        assert np.array_equal(stored(prefix), stored(encoded / name))
        assert read_latent_record(prefix).source == f"{bucket}/images/{name}"
    assert list((tmp_path / "work").glob("*/*")) == []
