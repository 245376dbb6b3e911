"""From a folder of images, or archives of it, to a dataset; interrupted, resumed, refused."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import (
    BadDataError,
    EmptyDatasetError,
    OccupiedPrefixError,
    UnreadableSourceError,
)
from pipelines.ingest.__main__ import main
from pipelines.ingest.images import IngestConfig, Resize
from pipelines.ingest.listing import Listing, hold_out, list_images
from pipelines.ingest.verify import verify
from pipelines.shards import ShardedDataset
from tests.support.s3_server import S3Server
from tests.unit.pipelines import pictures
from tests.unit.pipelines.stored import ingest

CLASSES = {"bee": 9, "ant": 7, "cow": 4}
SMALL = IngestConfig(shard_bytes=1500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for number, (name, count) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            data = pictures.png(12, 10, seed=100 * number + image)
            (root / name / f"{image:03d}.PNG").write_bytes(data)
    (root / "bee" / "notes.txt").write_text("not an image")
    (root / "README.md").write_text("not a class")
    return root


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(prefix: Path | str) -> list[tuple[bytes, int]]:
    dataset = ShardedDataset(str(prefix))
    samples = [dataset.read(place) for place in range(len(dataset))]
    return [(sample.data, sample.label) for sample in samples]


def written(listing: Listing, prefix: Path, config: IngestConfig = SMALL) -> list[str]:
    notes: list[str] = []
    ingest(listing, str(prefix), config=config, report=notes.append)
    return notes


def test_a_folder_becomes_a_dataset_with_its_bytes_and_classes(
    folder: Path, tmp_path: Path
) -> None:
    listing = list_images(folder)
    assert listing.classes == ("ant", "bee", "cow")
    notes = written(listing, tmp_path / "out")
    assert "20 images (100%)" in notes[-1]
    want = {
        (path.read_bytes(), listing.classes.index(path.parent.name))
        for path in folder.rglob("*.PNG")
    }
    got = contents(tmp_path / "out")
    assert len(got) == 20
    assert set(got) == want
    # The classes are mixed, so that a block of neighbouring samples holds many of them.
    assert [label for _, label in got] != sorted(label for _, label in got)
    assert len(ShardedDataset(str(tmp_path / "out")).shard_sizes) > 3
    about = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert about["classes"] == ["ant", "bee", "cow"]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir())[:2] == [".json", ".json"]
    assert not (tmp_path / ".out.building").exists()


def test_archives_are_read_in_place_and_give_the_same_dataset(folder: Path, tmp_path: Path) -> None:
    files = {
        name: {p.name: p.read_bytes() for p in sorted((folder / name).glob("*.PNG"))}
        for name in CLASSES
    }
    per_class = tmp_path / "per_class"
    per_class.mkdir()
    for name, members in files.items():
        archive(per_class / f"{name}.tar", members)
    nested = archive(
        tmp_path / "nested.tar", {p.name: p.read_bytes() for p in sorted(per_class.iterdir())}
    )
    flat = archive(
        tmp_path / "flat.tar",
        {f"train/{c}/{n}": data for c, members in files.items() for n, data in members.items()},
    )
    written(list_images(folder), tmp_path / "from_folder")
    want = (tmp_path / "from_folder" / "index.json").read_bytes()
    for number, source in enumerate((per_class, nested, flat)):
        written(list_images(source), tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}" / "index.json").read_bytes() == want


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: p / "nothing", UnreadableSourceError, "cannot be read"),
        (lambda p: (p / "empty").mkdir() or p / "empty", EmptyDatasetError, "holds no images"),
        (
            lambda p: (p / "x.tar").write_bytes(b"junk" * 500) and p / "x.tar",
            UnreadableSourceError,
            "Only uncompressed",
        ),
        (
            lambda p: archive(p / "y.tar", {"a.png": pictures.png(4, 4)}),
            UnreadableSourceError,
            "outside of any class",
        ),
    ],
)
def test_sources_that_cannot_be_used(
    make: Callable[[Path], Path], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        list_images(make(tmp_path))


def test_class_names_may_be_given(folder: Path) -> None:
    listing = list_images(folder, classes=("cow", "dog", "bee", "ant"))
    assert {image.label for image in listing.images} == {0, 2, 3}
    with pytest.raises(UnreadableSourceError, match="the class 'cow'"):
        list_images(folder, classes=("ant", "bee"))


def test_hold_out_takes_its_share_of_each_class(folder: Path) -> None:
    listing = list_images(folder)
    kept, held = hold_out(listing, fraction=0.3, seed=1)
    assert sorted(kept.images + held.images, key=lambda i: i.name) == list(listing.images)
    shares = [sum(i.label == label for i in held.images) for label in range(3)]
    assert shares == [round(0.3 * 7), round(0.3 * 9), round(0.3 * 4)]
    assert hold_out(listing, fraction=0.3, seed=1)[1] == held
    assert hold_out(listing, fraction=0.3, seed=2)[1] != held


def test_resize_crops_the_centre_and_keeps_grey() -> None:
    ramp = np.zeros((40, 90), dtype=np.uint8)
    ramp[:, 45:] = 200
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    with Image.open(io.BytesIO(Resize(image_size=8, encoding="png")(file.getvalue()))) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
        small = np.asarray(image)
    # The edge lies in the middle; a bicubic filter overshoots beside it.
    assert small[:, :3].max() < 10
    assert abs(small[:, 5:].astype(int) - 200).max() < 10
    enlarged = Resize(image_size=64)(pictures.png(12, 10))
    with Image.open(io.BytesIO(enlarged)) as image:
        assert (image.size, image.format) == ((64, 64), "JPEG")


@pytest.mark.parametrize("resize", [None, Resize(image_size=8)])
def test_truncated_images_are_left_out(folder: Path, tmp_path: Path, resize: Resize | None) -> None:
    half = pictures.jpeg(40, 40)[:700]
    cut = {"cut.jpg": half, "cut.png": pictures.png(40, 40)[:-12], "sparse.jpg": half + bytes(900)}
    for name, data in cut.items():
        (folder / "cow" / name).write_bytes(data)
    written(
        list_images(folder),
        tmp_path / "out",
        config=replace(SMALL, resize=resize, max_skipped_fraction=0.2),
    )
    about = json.loads((tmp_path / "out" / "ingest.json").read_text())
    named = [Path(name).name for name, _ in about["skipped"]]
    assert named == sorted(cut)
    assert about["images_per_class"] == [7, 9, 4]
    assert len(ShardedDataset(str(tmp_path / "out"))) == 20
    assert verify(str(tmp_path / "out")).faults == []


def test_bad_images_are_left_out_and_named_up_to_a_share(folder: Path, tmp_path: Path) -> None:
    (folder / "cow" / "bad.jpg").write_bytes(b"")
    (folder / "cow" / "text.png").write_bytes(b"no picture at all")
    listing = list_images(folder)
    with pytest.raises(BadDataError, match=r"2 of 22 images .*cow/bad.jpg .the file is empty"):
        written(listing, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written(listing, tmp_path / "out", IngestConfig(shard_bytes=1500, max_skipped_fraction=0.1))
    assert len(contents(tmp_path / "out")) == 20
    about = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert sorted(name for name, _ in about["skipped"]) == ["cow/bad.jpg", "cow/text.png"]


def test_nothing_is_replaced(folder: Path, tmp_path: Path) -> None:
    listing = list_images(folder)
    written(listing, tmp_path / "out")
    assert written(listing, tmp_path / "out") == ["complete, nothing to do"]
    with pytest.raises(OccupiedPrefixError, match="another dataset"):
        written(listing, tmp_path / "out", IngestConfig(shard_bytes=1500, seed=1))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "one.tex").write_text("…")
    with pytest.raises(OccupiedPrefixError, match="other files"):
        written(listing, tmp_path / "thesis")


def test_two_ingests_of_one_target_at_once_agree(folder: Path, tmp_path: Path) -> None:
    listing = list_images(folder)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(written, listing, tmp_path / "out") for _ in range(2)]
        last = sorted(run.result()[-1] for run in runs)
    assert "20 images (100%)" in last[1] or "20 images (100%)" in last[0]
    assert any(text.endswith("complete, nothing to do") for text in last)
    written(listing, tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.slow
def test_several_processes_write_the_same(folder: Path, tmp_path: Path) -> None:
    listing = list_images(folder)
    written(listing, tmp_path / "one")
    written(listing, tmp_path / "two", IngestConfig(shard_bytes=1500, workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
def test_a_killed_ingest_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    written(list_images(folder), tmp_path / "whole" / "train")
    command = [
        *(sys.executable, "-c", HALF_AN_INGEST, "image-folder", str(folder), str(tmp_path / "out")),
        *("--workers", "1"),
    ]
    process = subprocess.Popen(command, start_new_session=True)
    work = tmp_path / "out" / ".train.building"
    while len(list(work.glob("*.record"))) < 2:
        assert process.poll() is None, "the ingest ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in work.glob("*.mds")}
    recorded = {p.stem for p in work.glob("*.record")}
    assert not (tmp_path / "out" / "train").exists()

    written(list_images(folder), tmp_path / "out" / "train")
    for path in (tmp_path / "whole" / "train").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "train" / path.name).read_bytes()
    for name in recorded:
        resumed = tmp_path / "out" / "train" / f"{name}.mds"
        assert resumed.stat().st_mtime_ns == kept[f"{name}.mds"]


# The command line with small shards, that stops after two of them, to be killed.
HALF_AN_INGEST = """
import itertools, signal, sys
from pipelines.ingest import images, plan
from pipelines.ingest.__main__ import main
write = plan.write_shards
def two(parts, *arguments, **options):
    yield from itertools.islice(write(parts, *arguments, **options), 2)
    signal.pause()
plan.write_shards = two
cut = images.cut
images.cut = lambda samples, shard_bytes, size: cut(samples, shard_bytes=1500, size=size)
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_writes_two_splits_and_verifies_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["image-folder", str(folder), str(out), "--hold-out", "0.25", "--image-size", "8"]
    assert main([*command, "--encoding", "png", "--workers", "1"]) == 0
    assert main(["verify", str(out / "train")]) == 0
    assert main(["verify", str(out / "test")]) == 0
    said = capsys.readouterr().out
    assert "20 images of 3 classes" in said
    assert "15 of 8 x 8\n" in said
    assert main(["image-folder", str(tmp_path / "missing"), str(out)]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_takes_the_dataset_and_an_interrupted_upload_goes_on(
    folder: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"{s3.make_bucket('pictures')}/small/train"
    config = IngestConfig(shard_bytes=1500, work_dir=tmp_path / "work")
    listing = list_images(folder)
    written(listing, tmp_path / "local")

    def stop_early(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.ingest.plan._REPORT_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        ingest(listing, prefix, config=config, report=stop_early)
    (uploaded,) = s3.client.list_objects_v2(Bucket="pictures")["Contents"]
    s3.client.put_object(Bucket="pictures", Key=uploaded["Key"], Body=b"cut short")
    with pytest.raises(KeyboardInterrupt):
        ingest(listing, prefix, config=config, report=stop_early)
    assert s3.client.list_objects_v2(Bucket="pictures")["Contents"][0]["Size"] == uploaded["Size"]
    s3.client.delete_object(Bucket="pictures", Key=uploaded["Key"])
    ingest(listing, prefix, config=config, report=lambda _: None)
    assert contents(prefix) == contents(tmp_path / "local")
    assert ShardedDataset(prefix).digest == ShardedDataset(str(tmp_path / "local")).digest
    assert list((tmp_path / "work").glob("*/*")) == []
    notes: list[str] = []
    ingest(listing, prefix, config=config, report=notes.append)
    assert notes == ["complete, nothing to do"]
