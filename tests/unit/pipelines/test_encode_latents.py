"""The command that encodes images: what it stores, its interruptions, what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec import AutoencoderKlCodec
from models.pyramid import split
from pipelines.decode import DecodeConfig, LatentDecodeConfig, make_decoder
from pipelines.errors import (
    BadDataError,
    EmptyDatasetError,
    IngestSettingError,
    OccupiedPrefixError,
)
from pipelines.ingest.__main__ import main as ingest_command
from pipelines.ingest.about import read_about
from pipelines.ingest.latents.__main__ import main
from pipelines.ingest.latents.encode import EncodeConfig, LatentPlan
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.latent_record import read_latent_record
from pipelines.sample_key import SampleKey
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.autoencoder import saved_autoencoder
from tests.support.s3_server import S3Server
from tests.unit.pipelines import pictures
from trainer.autoencoder import open_codec, open_encoder
from trainer.autoencoder_files import find_autoencoder
from trainer.checkpoint.store import StoreConfig

IMAGES, SIZE, BATCH = 23, 32, 7
SETTINGS = ("--image-size", str(SIZE), "--batch", str(BATCH))
# 5 latents of 2 views of 2 moments of 4 x 4 x 4 numbers of float32.
SMALL = EncodeConfig(
    image_size=SIZE, dtype="float32", batch=3, shard_bytes=5 * 1024, shards=ShardsConfig()
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    saved_autoencoder(folder / "autoencoder", channels=3)
    for name, count, first in (("train", IMAGES, 0), ("test", 4, 100)):
        data = [pictures.png(40, 36, seed=first + place) for place in range(count)]
        images = [LabelledImage(image, place % 3) for place, image in enumerate(data)]
        write_dataset(images, str(folder / "images" / name), shard_bytes=20_000)
    return folder


@pytest.fixture(scope="module")
def encoder(place: Path) -> Encoder:
    files = find_autoencoder(str(place / "autoencoder"), cache=place, store=StoreConfig())
    return Encoder(
        place="here",
        sha256=files.sha256,
        factor=8,
        channels=4,
        image_channels=3,
        scale=files.scale,
        shift=files.shift,
        precision="fp32",
        load=partial(open_encoder, files, precision="fp32"),
    )


@pytest.fixture(scope="module")
def codec(place: Path) -> AutoencoderKlCodec:
    files = find_autoencoder(str(place / "autoencoder"), cache=place, store=StoreConfig())
    return open_codec(files, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def encoded(place: Path) -> Path:
    """Both splits in float32, by the command."""
    assert command(place, place / "latents", "--dtype", "float32") == 0
    return place / "latents"


def command(place: Path, target: Path | str, *more: str) -> int:
    source, autoencoder = str(place / "images"), str(place / "autoencoder")
    return main([source, str(target), "--autoencoder", autoencoder, *SETTINGS, *more])


def encode(source: Path, target: Path, encoder: Encoder, config: EncodeConfig = SMALL) -> list[str]:
    notes: list[str] = []
    LatentPlan(str(source), str(target), encoder=encoder, config=config).carry_out(notes.append)
    return notes


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(prefix: Path | str) -> np.ndarray:
    """Moments of all samples, [samples, views, mean and deviation, channels, height, width]."""
    dataset = ShardedDataset(str(prefix))
    form = dataset.latents
    assert form is not None
    data = b"".join(dataset.read(number).data for number in range(len(dataset)))
    return np.frombuffer(data, form.dtype).reshape(-1, *form.shape)


def by_hand(place: Path, codec: AutoencoderKlCodec, decoder: str) -> torch.Tensor:
    """What the codec itself gives for the images of the training split and their mirror images."""
    dataset = ShardedDataset(str(place / "images" / "train"))
    decode = make_decoder(decoder, DecodeConfig(image_size=SIZE, scales=1), device="cpu")
    batches = []
    for first in range(0, len(dataset), BATCH):
        ids = range(first, min(first + BATCH, len(dataset)))
        (images,) = decode([dataset.read(number).data for number in ids])
        views = [torch.stack(codec.moments(view), 1) for view in (images, images.flip(-1))]
        batches.append(torch.stack(views, 1))
    return torch.cat(batches)


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
        [sys.executable, "-c", SLOW_ENCODING, source, target, *options], start_new_session=True
    )
    work = tmp_path / "out" / ".train.building"
    deadline = time.monotonic() + 60
    while len(list(work.glob("*.record"))) < 2:
        assert process.poll() is None, "the encoding ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    recorded = {path.stem for path in work.glob("*.record")}
    kept = {name: (work / f"{name}.mds").stat().st_mtime_ns for name in recorded}
    assert 2 <= len(recorded) <= 3  # of 5, so that two processes have something to do
    assert not (tmp_path / "out" / "train").exists()

    two = dataclasses.replace(SMALL, devices=("cpu", "cpu"))
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


# The command with small shards, slowed down so that it can be killed in the middle.
SLOW_ENCODING = """
import sys, time
from pipelines.ingest.latents import encode
from pipelines.ingest.latents.__main__ import main
write = encode.write_shards
def slowly(parts, *arguments, **options):
    for shard in write(parts, *arguments, **options):
        time.sleep(0.3)
        yield shard
encode.write_shards = slowly
cut = encode.cut
encode.cut = lambda images, sample_bytes, shard_bytes: cut(
    images, sample_bytes=sample_bytes, shard_bytes=5 * 1024
)
sys.exit(main(sys.argv[1:]))
"""


def with_bad_images(folder: Path, bad: Sequence[int], count: int = 12) -> Path:
    images = [
        LabelledImage(pictures.BAD["half a PNG"] if i in bad else pictures.png(seed=i), i % 3)
        for i in range(count)
    ]
    write_dataset(images, str(folder), shard_bytes=5_000)
    return folder


def test_images_that_cannot_be_decoded_are_left_out_and_named(
    tmp_path: Path, encoder: Encoder
) -> None:
    source = with_bad_images(tmp_path / "images", (1, 5, 6, 7, 8, 9))
    config = dataclasses.replace(SMALL, max_skipped_share=0.5)
    notes = encode(source, tmp_path / "latents", encoder, config)
    assert "12 images (100%), 6 skipped" in notes[-1]
    record = read_latent_record(str(tmp_path / "latents"))
    assert (record.samples, record.skipped) == (6, (1, 5, 6, 7, 8, 9))
    dataset = ShardedDataset(str(tmp_path / "latents"))
    # The middle one of three shards is empty, and not in the index.
    assert list(dataset.shard_sizes) == [4, 2]
    assert [dataset.read(i).label for i in range(6)] == [0, 2, 0, 1, 1, 2]
    about = read_about(str(tmp_path / "latents"))
    assert about is not None
    images = ShardedDataset(str(source))
    assert about.skipped[0][0] == f"sample 1 in shard {images.shard_of(1)}"
    assert "half" not in about.skipped[0][1]
    # What is left is the same as without the bad ones.
    good = with_bad_images(tmp_path / "good", ())
    encode(good, tmp_path / "all", encoder)
    kept = [0, 2, 3, 4, 10, 11]
    np.testing.assert_allclose(
        stored(tmp_path / "latents"), stored(tmp_path / "all")[kept], rtol=0, atol=1e-5
    )


def test_too_many_undecodable_images_stop_it_early_and_the_limit_may_be_raised(
    tmp_path: Path, encoder: Encoder
) -> None:
    source = with_bad_images(tmp_path / "images", (1,))
    with pytest.raises(BadDataError, match=r"1 of 12 images cannot be decoded.*--max-skipped"):
        encode(source, tmp_path / "latents", encoder)
    work = tmp_path / ".latents.building"
    assert [path.stem for path in work.glob("*.record")] == ["shard.00000"]
    encode(source, tmp_path / "latents", encoder, dataclasses.replace(SMALL, max_skipped_share=0.1))
    assert len(ShardedDataset(str(tmp_path / "latents"))) == 11
    none = with_bad_images(tmp_path / "none", range(12))
    with pytest.raises(EmptyDatasetError, match="None of the images"):
        encode(none, tmp_path / "no", encoder, dataclasses.replace(SMALL, max_skipped_share=1.0))


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


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--image-size", "60"], ["image_size=60", "multiple of 8, such as 64"]),
        (["--image-size", "4"], ["image_size=4", "such as 8"]),
        (["--autoencoder", "nowhere"], ["no folder nowhere", "--autoencoder nowhere"]),
        (["--devices", "cuda:77"], ["--devices cuda:77", "cpu"]),
        (["--devices", ","], ["--devices ,"]),
        (["--workers", "0"], ["--workers 0"]),
        (["--batch", "0"], ["batch=0"]),
        (["--shard-mib", "0"], ["shard_bytes=0"]),
        (["--shard-mib", "4096"], ["shard_bytes=4294967296"]),
        (["--max-skipped-share", "2"], ["max_skipped_share=2.0"]),
        (["--splits", "train,train"], ["--splits train,train"]),
        (["--splits", "valid"], ["no dataset at", "images/valid"]),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: list[str],
    parts: list[str],
) -> None:
    assert command(place, tmp_path / "latents", *change) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "codec.source" not in said
    for part in parts:
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(
    place: Path, encoded: Path, tmp_path: Path, encoder: Encoder, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files_in(encoded / "test")
    assert command(place, encoded) == 2  # float16 this time
    assert "holds another dataset" in capfd.readouterr().err
    assert files_in(encoded / "test") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(OccupiedPrefixError, match="left alone"):
        encode(place / "images" / "train", tmp_path / "mine", encoder)
    assert main([str(encoded), str(tmp_path / "l"), "--autoencoder", str(place / "autoencoder"),
                 *SETTINGS]) == 2  # fmt: skip
    assert "holds latents already" in capfd.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "l"), "--autoencoder", str(place / "autoencoder"),
                 *SETTINGS]) == 2  # fmt: skip
    assert "--splits" in capfd.readouterr().err


def test_an_autoencoder_that_does_not_fit_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved_autoencoder(tmp_path / "grey", channels=1)
    assert command(place, tmp_path / "l", "--autoencoder", str(tmp_path / "grey")) == 2
    assert "images of 1 channels" in capfd.readouterr().err
    saved_autoencoder(tmp_path / "other", channels=3)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    changed = {**config, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(changed))
    assert command(place, tmp_path / "l", "--autoencoder", str(tmp_path / "other")) == 2
    assert "latents_mean" in capfd.readouterr().err


class Infinite:
    """An encoder that gives one number float16 cannot hold."""

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.zeros(len(images), 4, 4, 4)
        mean[-1, 0, 0, 0] = 1e6
        return mean, torch.ones_like(mean)

    @classmethod
    def load(cls, device: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        assert device == "cpu"
        return cls()


def test_latents_that_float16_cannot_hold_stop_it(
    place: Path, tmp_path: Path, encoder: Encoder
) -> None:
    bold = dataclasses.replace(encoder, load=Infinite.load)
    config = dataclasses.replace(SMALL, dtype="float16", batch=4)
    with pytest.raises(ValueError, match=r"sample 3 of .* is not finite in float16.*--dtype"):
        encode(place / "images" / "train", tmp_path / "latents", bold, config)


def out_of_memory(_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_device_without_enough_memory_is_told_of(
    place: Path, tmp_path: Path, encoder: Encoder
) -> None:
    source = place / "images" / "train"
    large = dataclasses.replace(encoder, load=out_of_memory)
    with pytest.raises(IngestSettingError, match=r"The autoencoder at here.*--workers"):
        encode(source, tmp_path / "latents", large)
    greedy = dataclasses.replace(encoder, load=lambda device: out_of_memory)
    with pytest.raises(IngestSettingError, match=r"Encoding 3 images at a time.*Lower --batch 3;"):
        encode(source, tmp_path / "latents", greedy)
    # A batch that fits goes on with the same latents.
    assert encode(source, tmp_path / "latents", encoder, dataclasses.replace(SMALL, batch=2))


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
