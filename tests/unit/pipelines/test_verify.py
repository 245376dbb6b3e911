"""A verification finds everything that is wrong with a dataset, and goes on past it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import MissingDatasetError, StoreUnreachableError
from pipelines.index import parse_index
from pipelines.ingest.__main__ import main
from pipelines.ingest.about import ABOUT_NAME
from pipelines.ingest.images import IngestConfig
from pipelines.ingest.listing import list_images
from pipelines.ingest.verify import VerifyConfig, verify
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset
from pipelines.source import Source
from tests.support.s3_server import S3Server
from tests.unit.pipelines import pictures
from tests.unit.pipelines.stored import ingest

CLASSES = {"ant": 7, "bee": 9, "cow": 4}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in several shards, with the names of the classes; to be read only."""
    root = tmp_path_factory.mktemp("verify")
    for number, (name, count) in enumerate(CLASSES.items()):
        (root / "pictures" / name).mkdir(parents=True)
        for image in range(count):
            data = pictures.png(12, 10, seed=100 * number + image)
            (root / "pictures" / name / f"{image}.png").write_bytes(data)
    listing = list_images(root / "pictures")
    # How small an image becomes differs between versions of zlib.
    config = IngestConfig(shard_bytes=4 * max(image.size for image in listing.images))
    ingest(listing, str(root / "train"), config=config, report=lambda _: None)
    return root / "train"


@pytest.fixture
def train(tmp_path: Path, ingested: Path) -> Path:
    """A dataset of its own for each test, to be damaged at will."""
    return shutil.copytree(ingested, tmp_path / "train")


def verified(*words: str) -> int:
    """Run the command in this process, which takes milliseconds."""
    return main(["verify", *words, "--workers", "1"])


def shards_of(prefix: Path) -> dict[str, int]:
    index = (prefix / "index.json").read_bytes()
    return {shard.name: shard.samples for shard in parse_index(index, prefix=str(prefix))}


def cut_short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def replace_by_a_folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def test_a_sound_dataset_is_described(
    train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(str(train), "--report", str(tmp_path / "report.json")) == 0
    said = capsys.readouterr().out
    assert f"20 images in {len(shards_of(train))} shards of" in said
    assert "20 PNG RGB\n  20 of 10 x 12\n" in said
    assert "3 classes, 4 to 9 images each\n  0 ant  7  ####" in said
    assert "no two images with the same bytes" in said
    assert said.endswith("FINE: all as it should be\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == []
    assert report["classes"] == list(CLASSES)
    assert report["samples_per_class"] == {"0": 7, "1": 9, "2": 4}
    assert report["digest"] == ShardedDataset(str(train)).digest


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "not there"),
        (cut_short, "bytes long instead of"),
        (flip_a_bit, "does not have the sha256 hash"),
        (replace_by_a_folder, "not there"),
    ],
)
def test_all_damaged_shards_are_listed_and_the_others_are_read(
    damage: Callable[[Path], None],
    words: str,
    train: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = shards_of(train)
    first, *_, last = shards
    for name in (first, last):
        damage(train / name)
    report = verify(str(train))
    lost = shards[first] + shards[last]
    assert [(bad.name, bad.lost, bad.samples) for bad in report.bad_shards] == [
        (name, shards[name], shards[name]) for name in (first, last)
    ]
    assert sum(report.samples_per_class.values()) == 20 - lost
    assert report.miscounts == []  # the lost samples say it all
    assert verified(str(train)) == 1
    said = capsys.readouterr().out
    for name in (first, last):
        assert re.search(rf"  {name}: {shards[name]} of .* samples lost: .*{words}", said)
    assert f"BAD: 2 of {len(shards)} shards are missing or damaged, with {lost} samples" in said


def test_all_shards_may_be_gone(train: Path) -> None:
    shards = shards_of(train)
    for name in shards:
        (train / name).unlink()
    report = verify(str(train))
    assert sum(bad.lost for bad in report.bad_shards) == report.samples == 20
    assert "FINE" not in report.text()
    assert f"{len(shards)} of {len(shards)} shards" in report.text()


def test_a_malformed_sample_does_not_hide_its_neighbours(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardedDataset.read
    first, second, *_ = shards_of(train).values()

    def bad_disk(self: ShardedDataset, sample_id: int) -> object:
        if sample_id == first + 1:
            raise OSError(5, "Input/output error")
        return read(self, sample_id)

    monkeypatch.setattr(ShardedDataset, "read", bad_disk)
    report = verify(str(train))
    (bad,) = report.bad_shards
    assert (bad.lost, bad.samples) == (second - 1, second)
    assert second > 1
    assert "Input/output error" in bad.problem


def test_what_cannot_be_decoded_is_named(
    tmp_path: Path, images: list[LabelledImage], capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "train")
    bad = LabelledImage(pictures.BAD["half a PNG"], 3)
    write_dataset([*images[:5], bad, *images[5:]], target, shard_bytes=2000)
    assert verified(target) == 1
    said = capsys.readouterr().out
    shard = ShardedDataset(target).shard_of(5)
    assert f"images that cannot be used\n  sample 5 in {shard}: " in said
    assert "BAD: 1 images cannot be used\n" in said


def test_the_decoder_that_trains_decides(tmp_path: Path, images: list[LabelledImage]) -> None:
    """Pillow reads this one, libpng and so DALI do not; training skips it, and verify says so."""
    target = str(tmp_path / "train")
    lax = LabelledImage(pictures.png_without_checksum(), 3)
    write_dataset([*images[:5], lax, *images[5:]], target, shard_bytes=2000)
    assert [bad.sample_id for bad in verify(target).bad_samples] == [5]
    assert verified(target) == 1
    assert verified(target, "--decoder", "pillow") == 0


def test_labels_are_compared_with_the_classes(
    train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((train / ABOUT_NAME).read_text())
    about |= {"classes": ["ant", "bee"], "images_per_class": [8, 9]}
    (train / ABOUT_NAME).write_text(json.dumps(about))
    assert verified(str(train)) == 2
    assert "if you changed it yourself, remove its field sha256" in capsys.readouterr().err
    del about["sha256"]
    (train / ABOUT_NAME).write_text(json.dumps(about))
    assert verified(str(train)) == 1
    said = capsys.readouterr().out
    dataset = ShardedDataset(str(train))
    stray = [place for place in range(20) if dataset.read(place).label == 2]
    assert len(stray) == 4
    assert "labels of no class\n" + "".join(f"  sample {s}: label 2\n" for s in stray) in said
    assert "class 0 ant: 7 instead of 8\n" in said
    assert "class 1" not in said


@pytest.mark.parametrize("label", [-1, -(2**40)])
def test_a_negative_label_is_of_no_class(
    label: int, tmp_path: Path, images: list[LabelledImage]
) -> None:
    write_dataset([*images, LabelledImage(pictures.png(), label)], str(tmp_path / "train"))
    report = verify(str(tmp_path / "train"))  # which has no list of classes
    assert report.stray_labels == [(len(images), label)]
    assert report.classes is None


def test_duplicates_are_told_and_may_be_forbidden(
    tmp_path: Path, images: list[LabelledImage], capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "train")
    relabelled = LabelledImage(images[7].data, images[7].label + 1)
    write_dataset([*images, images[3], relabelled, images[3]], target, shard_bytes=2000)
    assert verified(target) == 0
    said = capsys.readouterr().out
    assert (
        "3 images repeat the bytes of others, in 2 groups, 1 of them with different labels" in said
    )
    assert "  samples 7, 49 (different labels)\n  samples 3, 48, 50\n" in said
    assert verified(target, "--forbid-duplicates") == 1
    assert "BAD: 3 samples repeat others" in capsys.readouterr().out


def test_many_classes_are_told_in_short(tmp_path: Path) -> None:
    samples = [
        LabelledImage(pictures.png(seed=label, mode="L"), label)
        for label in range(30)
        for _ in range(2 if label == 17 else 1)
    ]
    write_dataset(samples, str(tmp_path / "train"))
    said = verify(str(tmp_path / "train")).text()
    assert "30 classes, 1 to 2 images each\n  fewest: 0 1, 1 1, 2 1\n  most: 17 2, " in said


def test_what_cannot_be_verified_is_refused(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingDatasetError):
        verify(str(tmp_path))
    for words, message in (
        ([str(tmp_path / "none")], "There is no dataset at"),
        ([str(train), "--workers", "0"], "workers=0 must be at least 1"),
        ([str(train), "--report", str(tmp_path / "no" / "where")], "where cannot be written"),
    ):
        assert main(["verify", *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    (train / ABOUT_NAME).write_text("{}")
    assert verified(str(train)) == 2
    assert f"{train}/ingest.json is not what pipelines.ingest writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "{train} --workers 1 --json {file}",
        "{train} --workers 1 --json={file}",
        "--json {file} {train} --workers 1",
        "--workers 1 --json {file} --decoder pillow {train}",
    ],
)
def test_a_file_behind_json_is_understood_with_a_note(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    file = tmp_path / "report.json"
    assert main(["verify", *words.format(train=train, file=file).split()]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("FINE: all as it should be\n")
    assert said.err.startswith("note: --json FILE is --report FILE now")
    for flags in (["--json", str(train)], [str(train), "--json"]):
        assert main(["verify", "--workers", "1", "-q", *flags]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out) == {**json.loads(file.read_text()), "exit_code": 0}
        assert said.err == ""


def test_a_shard_that_its_store_does_not_give_is_listed(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *_ = shards_of(train)
    fetch = Source.fetch
    refused = [name]

    def refuse(self: Source, wanted: str, path: Path, **options: int) -> None:
        if wanted in refused:
            raise StoreUnreachableError(f"The store refused to give {wanted}.")
        fetch(self, wanted, path, **options)

    monkeypatch.setattr(Source, "fetch", refuse)
    prefix = f"file://{train}"
    (bad,) = verify(prefix).bad_shards
    assert (bad.name, bad.lost) == (name, bad.samples)
    assert "refused" in bad.problem
    # A store that gives nothing at all has not been verified.
    monkeypatch.setattr(Source, "read_index", lambda self: refuse(self, name, train))
    with pytest.raises(StoreUnreachableError):
        verify(prefix)


@pytest.mark.slow
def test_processes_find_the_same_and_say_how_far_they_are(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ingest.verify._REPORT_EVERY_S", 0.0)
    cut_short(train / list(shards_of(train))[1])
    notes: list[str] = []
    alone = verify(str(train))
    assert verify(str(train), config=VerifyConfig(workers=2), report=notes.append) == alone
    assert len(notes) == len(shards_of(train)) - 1
    assert all(re.fullmatch(r"\d+% read, about \d+ s left", text) for text in notes)


@pytest.mark.slow
def test_the_store_is_read_and_not_the_cache(
    train: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.make_bucket("verified").removeprefix("s3://")
    for path in train.iterdir():
        s3.client.upload_file(str(path), bucket, f"set/train/{path.name}")
    prefix = f"s3://{bucket}/set/train"
    dataset = ShardedDataset(prefix)
    dataset.prepare(np.arange(len(dataset)))  # into the cache of this node
    assert verify(prefix).faults == []
    first, second, *_ = shards_of(train)
    cut_short(train / first)
    s3.client.upload_file(str(train / first), bucket, f"set/train/{first}")
    s3.client.delete_object(Bucket=bucket, Key=f"set/train/{second}")
    found = verify(prefix, config=VerifyConfig(workers=2)).bad_shards
    assert [bad.name for bad in found] == [first, second]
