"""Latents that another program computed: what is stored of their arrays."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from tests.unit.pipelines.latents.arrays import labels, moments, same, save, take_in
from tests.unit.pipelines.latents.encoding import files_in, stored

Arranged = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@pytest.mark.parametrize(
    ("views", "arranged", "options"),
    [
        (1, lambda a: a[0].reshape(8, 4, 4), []),
        (1, lambda a: a[0], []),
        (2, lambda a: a.reshape(2, 8, 4, 4), ["--views", "2"]),
        (2, lambda a: a, ["--views", "2"]),
        (1, lambda a: a[0, 0], ["--arrays", "latents"]),
        (2, lambda a: a[:, 0], ["--arrays", "latents", "--views", "2"]),
        (1, lambda a: np.asfortranarray(a[0]), []),
        (1, lambda a: a[0].astype(">f8"), []),
    ],
)
def test_each_shape_gives_exactly_its_moments(
    place: Path, tmp_path: Path, views: int, arranged: Arranged, options: list[str]
) -> None:
    wanted = moments(7, views=views)
    folder = save(tmp_path / "arrays", [arranged(array) for array in wanted], classes=2)
    if "latents" in options:
        wanted[:, :, 1] = 0
    assert take_in(place, folder, tmp_path / "out", *options) == 0
    assert same(tmp_path / "out" / "train", wanted)
    found = labels(tmp_path / "out" / "train")
    assert [found[array.tobytes()] for array in wanted] == [0, 1, 0, 1, 0, 1, 0]


def test_the_record_says_what_is_known_and_what_is_not(
    place: Path, tmp_path: Path, encoder: Encoder
) -> None:
    folder = save(tmp_path / "arrays", list(moments(7)[:, 0]), classes=2)
    assert take_in(place, folder, tmp_path / "out") == 0
    prefix = str(tmp_path / "out" / "train")
    record = read_latent_record(prefix)
    assert (record.source, record.source_sha256) == (str(folder), None)
    assert record.encode_precision is None
    assert record.autoencoder_sha256 == encoder.sha256
    assert (record.factor, record.channels, record.image_size) == (8, 4, 32)
    assert (record.samples, record.skipped, record.views) == (7, (), 1)
    assert record.format == ShardedDataset(prefix).latents
    about = read_about(prefix)
    assert about is not None
    assert (about.classes, about.images_per_class) == (("class0", "class1"), (4, 3))
    assert ingest_command(["verify", prefix]) == 0


def test_scaled_arrays_are_brought_back(
    place: Path, tmp_path: Path, codec: AutoencoderKlCodec
) -> None:
    wanted = moments(5).astype(np.float64)
    config = json.loads((place / "autoencoder" / "config.json").read_text())
    shifted = tmp_path / "shifted"
    shifted.mkdir()
    (shifted / "config.json").write_text(json.dumps({**config, "shift_factor": 0.5}))
    weights = "diffusion_pytorch_model.safetensors"
    (shifted / weights).symlink_to(place / "autoencoder" / weights)
    scaled = wanted[:, 0] * codec.scale
    scaled[:, 0] -= 0.5 * codec.scale
    folder = save(tmp_path / "arrays", list(scaled))
    options = ("--autoencoder", str(shifted), "--scaled")
    assert take_in(place, folder, tmp_path / "out", *options) == 0
    found = stored(tmp_path / "out" / "train")
    order = np.argsort(found[:, 0, 0, 0, 0, 0])
    wanted = wanted[np.argsort(wanted[:, 0, 0, 0, 0, 0])]
    np.testing.assert_allclose(found[order], wanted, rtol=1e-6, atol=1e-7)


def test_statistics_are_those_of_what_training_draws(place: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "arrays", list(moments(40, views=2)))
    assert take_in(place, folder, tmp_path / "out", "--views", "2") == 0
    record = read_latent_record(str(tmp_path / "out" / "train"))
    drawn = []
    for number, sample in enumerate(stored(tmp_path / "out" / "train")):
        for view, (mean, std) in enumerate(sample):
            normals = SampleKey(0, view, number).normals(mean.size).reshape(mean.shape)
            drawn.append((mean + std * normals - record.shift) * record.scale)
    latents = torch.from_numpy(np.stack(drawn))
    assert sorted(record.bands) == [1, 2, 3]
    for scales, bands in record.bands.items():
        for band, statistics in zip(split(latents.double(), scales), bands, strict=True):
            assert statistics.mean == pytest.approx(band.mean().item(), abs=1e-7)
            assert statistics.std == pytest.approx(band.std(correction=0).item(), rel=1e-6)


def test_what_training_reads_is_drawn_from_the_moments(place: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "arrays", list(moments(20)[:, 0]))
    assert take_in(place, folder, tmp_path / "out") == 0
    dataset = ShardedDataset(str(tmp_path / "out" / "train"))
    assert dataset.latents is not None
    config = LatentDecodeConfig(format=dataset.latents, scales=1, scale=0.5, shift=0.25)
    decode = make_decoder("dali", config, device="cpu")
    mean, std = stored(tmp_path / "out" / "train")[:, 0].swapaxes(0, 1)
    scores = []
    for epoch in range(50):
        keys = [SampleKey(9, epoch, number) for number in range(20)]
        (latents,) = decode([dataset.read(number).data for number in range(20)], keys)
        scores.append((latents.numpy() / 0.5 + 0.25 - mean) / std)
    # The smallest deviations drown in the rounding of their means.
    normals = np.stack(scores).astype(np.float64)[:, std > 1e-3]
    assert abs(normals.mean()) < 5 / normals.size**0.5
    assert abs(normals.var() - 1) < 5 * (2 / normals.size) ** 0.5


def test_a_share_of_each_class_is_held_out(place: Path, tmp_path: Path) -> None:
    wanted = moments(20)
    folder = save(tmp_path / "arrays", list(wanted[:, 0]), classes=2)
    assert take_in(place, folder, tmp_path / "out", "--hold-out", "0.2") == 0
    for name, counts in (("train", (8, 8)), ("test", (2, 2))):
        about = read_about(str(tmp_path / "out" / name))
        assert about is not None
        assert about.images_per_class == counts
    parts = [stored(tmp_path / "out" / name) for name in ("train", "test")]
    assert sorted(np.concatenate(parts)[:, 0, 0, 0, 0, 0]) == sorted(wanted[:, 0, 0, 0, 0, 0])


def test_a_folder_without_classes_is_one_class(place: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "arrays", list(moments(3)[:, 0])) / "class0"
    assert take_in(place, folder, tmp_path / "out", "--split", "test") == 0
    about = read_about(str(tmp_path / "out" / "test"))
    assert about is not None
    assert (about.classes, about.images_per_class) == (("class0",), (3,))


def test_edm2s_own_layout_has_its_classes_in_dataset_json(place: Path, tmp_path: Path) -> None:
    wanted = moments(6)
    names = [f"0000{i // 4}/img-mean-std-{i:08d}.npy" for i in range(6)]
    for name, array in zip(names, wanted, strict=True):
        path = tmp_path / "arrays" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array[0].reshape(8, 4, 4))
    pairs = [[name, (2, 0, 2, 2, 0, 2)[i]] for i, name in enumerate(names)]
    (tmp_path / "arrays" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    assert take_in(place, tmp_path / "arrays", tmp_path / "out") == 0
    found = labels(tmp_path / "out" / "train")
    assert [found[array.tobytes()] for array in wanted] == [2, 0, 2, 2, 0, 2]
    about = read_about(str(tmp_path / "out" / "train"))
    assert about is not None
    assert (about.classes, about.images_per_class) == (("0", "1", "2"), (2, 0, 4))
    (tmp_path / "names").write_text("ant\nbee\ncat\ndog\n")
    options = ("--classes", str(tmp_path / "names"))
    assert take_in(place, tmp_path / "arrays", tmp_path / "named", *options) == 0
    about = read_about(str(tmp_path / "named" / "train"))
    assert about is not None
    assert (about.classes, about.images_per_class) == (("ant", "bee", "cat", "dog"), (2, 0, 4, 0))


@pytest.mark.slow
def test_killed_and_gone_on_with_by_two_processes_it_is_the_same_to_the_bit(
    place: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "arrays", list(moments(50)[:, 0]), classes=3)
    run = [sys.executable, "-c", SMALL_SHARDS, str(folder)]
    options = ["--autoencoder", str(place / "autoencoder"), "--arrays", "mean-std"]
    subprocess.run([*run, str(tmp_path / "whole"), "99", *options, "--workers", "1"], check=True)
    half = [*run, str(tmp_path / "out"), "2", *options, "--workers", "1"]
    process = subprocess.Popen(half, start_new_session=True)
    work = tmp_path / "out" / ".train.building"
    while len(list(work.glob("*.record"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {
        path.stem: path.with_suffix(".mds").stat().st_mtime_ns for path in work.glob("*.record")
    }
    assert len(kept) == 2  # of 5
    assert not (tmp_path / "out" / "train").exists()
    again = [*run, str(tmp_path / "out"), "99", *options, "--workers", "2"]
    said = subprocess.run(again, check=True, capture_output=True, text=True).stdout
    assert "50 images (100%), 0 skipped" in said
    assert files_in(tmp_path / "out" / "train") == files_in(tmp_path / "whole" / "train")
    for name, written_at in kept.items():
        shard = tmp_path / "out" / "train" / f"{name}.mds"
        assert shard.stat().st_mtime_ns == written_at
    said = subprocess.run(again, check=True, capture_output=True, text=True).stdout
    assert "complete, nothing to do\n" in said


# The command with shards of 10 latents, which can stop after two, to be killed.
SMALL_SHARDS = """
import itertools, signal, sys
from pipelines.ingest import arrays, plan
from pipelines.ingest.latents.__main__ import main
if __name__ == "__main__":
    source, target, most, *options = sys.argv[1:]
    write, cut = plan.write_shards, arrays.cut
    def some(parts, *arguments, **settings):
        yield from itertools.islice(write(parts, *arguments, **settings), int(most))
        if most == "2":
            signal.pause()
    plan.write_shards = some
    arrays.cut = lambda samples, shard_bytes, size: cut(
        samples, shard_bytes=10 * size(samples[0]), size=size
    )
    sys.exit(main([source, target, *options]))
"""
