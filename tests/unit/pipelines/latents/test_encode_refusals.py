"""Images, settings and autoencoders that the command which encodes them cannot use."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import (
    BadDataError,
    EmptyDatasetError,
    IngestSettingError,
    OccupiedPrefixError,
)
from pipelines.ingest.about import read_about
from pipelines.ingest.latent_config import Encoder
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.latent_record import read_latent_record
from pipelines.shards import ShardedDataset
from tests.support.autoencoder import saved_autoencoder
from tests.unit.pipelines import pictures
from tests.unit.pipelines.latents.encoding import (
    SETTINGS,
    SMALL,
    command,
    encode,
    files_in,
    stored,
)
from trainer.cli.latents import main


def with_bad_images(folder: Path, bad: Sequence[int], count: int = 12) -> Path:
    images = [
        LabelledImage(pictures.BAD["half a PNG"] if i in bad else pictures.png(seed=i), i % 3)
        for i in range(count)
    ]
    write_dataset(images, str(folder), shard_bytes=5_000)
    return folder


@pytest.mark.slow
def test_images_that_cannot_be_decoded_are_left_out_and_named(
    tmp_path: Path, encoder: Encoder
) -> None:
    source = with_bad_images(tmp_path / "images", (1, 5, 6, 7, 8, 9))
    config = dataclasses.replace(SMALL, max_skipped_fraction=0.5)
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
    encode(
        source, tmp_path / "latents", encoder, dataclasses.replace(SMALL, max_skipped_fraction=0.1)
    )
    assert len(ShardedDataset(str(tmp_path / "latents"))) == 11
    none = with_bad_images(tmp_path / "none", range(12))
    with pytest.raises(EmptyDatasetError, match="None of the images"):
        encode(none, tmp_path / "no", encoder, dataclasses.replace(SMALL, max_skipped_fraction=1.0))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--image-size", "60"], ["image_size=60", "multiple of 8, such as 64"]),
        (["--image-size", "4"], ["image_size=4", "such as 8"]),
        (["--autoencoder", "nowhere"], ["no folder nowhere", "--autoencoder nowhere"]),
        (["--devices", "cuda:77"], ["--devices cuda:77", "cpu"]),
        (["--devices", ","], ["--devices ,"]),
        (["--workers", "0"], ["workers=0"]),
        (["--batch", "0"], ["batch=0"]),
        (["--shard-mib", "0"], ["shard_bytes=0"]),
        (["--shard-mib", "4096"], ["shard_bytes=4294967296"]),
        (["--max-skipped-fraction", "2"], ["max_skipped_fraction=2.0"]),
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
