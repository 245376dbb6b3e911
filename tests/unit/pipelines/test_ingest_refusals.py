"""What the ingest refuses before it writes: settings, class lists and places it cannot use."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import BadDataError, UnreadableSourceError
from pipelines.ingest.__main__ import main
from pipelines.ingest.images import IngestConfig
from pipelines.ingest.listing import ListedImage, list_images, read_class_names
from pipelines.ingest.plan import refuse_too_many
from pipelines.shards import ShardedDataset
from tests.unit.pipelines import pictures
from tests.unit.pipelines.stored import ingest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for image in range(5):
            (root / name / f"{image:03d}.png").write_bytes(pictures.png(4, 4, seed=image))
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--split test --hold-out 0.25", "--hold-out 0.25 goes to the split test"),
        ("--hold-out 1", r"--hold-out 1.0 must lie in \[0, 1\)"),
        ("--hold-out 0.01", "--hold-out 0.01 leaves no images for test"),
        ("--hold-out 0.99", "--hold-out 0.99 leaves no images for train"),
        ("--classes missing.txt", "class list missing.txt cannot be read"),
        ("--classes FOLDER", "class list FOLDER cannot be read"),
        ("--classes EMPTY", "class list EMPTY names no class"),
        ("--classes TWICE", "class list TWICE names 'ant' 2 times"),
        ("--classes GAP", "class list GAP has nothing in line 2"),
        ("--hold-out 0.05", "Choose another share, or take all images .* by --one-class"),
        ("--classes FOLDER/bee/000.png", "000.png cannot be read"),
        ("--seed -1", "seed=-1 must be 0 or more"),
        ("--image-size 0", "image_size=0 must be at least 1 pixel"),
        ("--image-size -8", "image_size=-8 must be at least 1 pixel"),
        ("--workers 0", "workers=0 must be at least 1"),
        ("--shard-mib 0", "shard_bytes=0 must be at least 1"),
        ("--max-skipped-fraction 1.5", r"max_skipped_fraction=1.5 must lie in \[0, 1\]"),
        ("--max-skipped-fraction nan", "max_skipped_fraction=nan must lie"),
    ],
)
def test_settings_that_cannot_be_used_are_named_and_nothing_is_written(
    words: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"FOLDER": str(folder)}
    for name, content in (("EMPTY", "\n"), ("TWICE", "ant\nbee\nant\n"), ("GAP", "ant\n\nbee\n")):
        (tmp_path / name).write_text(content)
        places[name] = str(tmp_path / name)
    for name, place in places.items():
        words, message = words.replace(name, place), message.replace(name, place)
    out = tmp_path / "out"
    assert main(["image-folder", str(folder), str(out), *words.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("FILE", "FILE cannot be made or written"),
        ("/proc/nowhere", "/proc/nowhere cannot be made or written"),
    ],
)
def test_targets_that_cannot_be_written(
    target: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("…")
    target, message = (text.replace("FILE", str(file)) for text in (target, message))
    assert main(["image-folder", str(folder), target]) == 2
    assert message in capsys.readouterr().err
    assert main(["digits", target]) == 2
    assert message in capsys.readouterr().err
    assert main(["digits", str(tmp_path / "out"), "--seed", "-1"]) == 2
    assert "seed=-1" in capsys.readouterr().err


def test_both_splits_are_checked_before_one_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "test").write_text("…")
    assert main(["image-folder", str(folder), str(out), "--hold-out", "0.25"]) == 2
    assert f"{out}/test is a file" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["test"]


def test_a_share_means_what_is_written() -> None:
    """In floats 0.29 of 100 are less than 29."""
    skipped = [(f"{number}.png", "damaged") for number in range(30)]
    refuse_too_many(skipped[:29], samples=100, max_skipped_fraction=0.29)
    with pytest.raises(BadDataError, match="30 of 100 images"):
        refuse_too_many(skipped, samples=100, max_skipped_fraction=0.29)


def test_images_that_are_repaired_after_a_refusal_are_read_again(tmp_path: Path) -> None:
    """Also if the names and sizes of the files, by which a start knows an earlier one, stay."""
    whole = [pictures.jpeg(20, 24, seed=seed) for seed in range(6)]
    for number, data in enumerate(whole):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data if number else bytes(len(data)))
    words = ["image-folder", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 2
    (tmp_path / "in" / "0.jpg").write_bytes(whole[0])
    assert main(words) == 0
    dataset = ShardedDataset(str(tmp_path / "out" / "train"))
    assert sorted(dataset.read(n).data for n in range(len(dataset))) == sorted(whole)


def test_an_image_that_is_there_and_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(200):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(pictures.jpeg(8, 8, seed=number))
    words = ["image-folder", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    read = ListedImage.read
    faults = iter([OSError(errno.EIO, "Input/output error")])

    def read_from_a_bad_disk(image: ListedImage) -> bytes:
        if image.name == "7.jpg" and (fault := next(faults, None)):
            raise fault
        return read(image)

    monkeypatch.setattr(ListedImage, "read", read_from_a_bad_disk)
    assert main(words) == 2
    assert "7.jpg cannot be read ([Errno 5] Input/output error)" in capsys.readouterr().err
    assert main(words) == 0
    assert len(ShardedDataset(str(tmp_path / "out" / "train"))) == 200


def test_a_class_list_from_another_system_is_the_same_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfbee\r\nant\r\n")
    assert read_class_names(tmp_path / "names") == ("bee", "ant")


def test_replaced_images_of_equal_size_are_not_taken_for_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by a start after the end, nor by one that goes on with half the shards."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    data = {color: solid(color) for color in (0, 7)}
    assert len(data[0]) == len(data[7])
    for number in range(4):
        (source / f"{number}.png").write_bytes(data[0])
    words = ["image-folder", str(source), str(out), "--workers", "1"]
    assert main(words) == 0
    assert main(words) == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    (source / "0.png").write_bytes(data[7])
    assert main(words) == 2
    assert "before some were replaced" in capsys.readouterr().err

    monkeypatch.setattr("pipelines.ingest.plan._REPORT_EVERY_S", 0.0)
    config = IngestConfig(shard_bytes=1)
    ingest(list_images(source), str(tmp_path / "whole"), config=config, report=lambda _: None)
    (source / "0.png").write_bytes(data[0])
    with pytest.raises(KeyboardInterrupt):
        ingest(list_images(source), str(tmp_path / "half"), config=config, report=stop)
    assert any((tmp_path / ".half.building").glob("*.mds"))
    (source / "0.png").write_bytes(data[7])
    ingest(list_images(source), str(tmp_path / "half"), config=config, report=lambda _: None)
    halves = [ShardedDataset(str(tmp_path / name)) for name in ("whole", "half")]
    assert halves[0].digest == halves[1].digest


def test_an_image_that_changes_while_it_is_taken_in_stops_it(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(solid(0))
    listing = list_images(tmp_path)
    (tmp_path / "1.png").write_bytes(solid(7))
    with pytest.raises(UnreadableSourceError, match="was changed while it was taken in"):
        ingest(listing, str(tmp_path / "out"), config=IngestConfig(), report=lambda _: None)


def solid(color: int) -> bytes:
    return pictures.encode(np.full((9, 9, 3), color, np.uint8), compress_level=0)


def stop(text: str) -> None:
    raise KeyboardInterrupt


_ON_A_SMALL_DISK = """
import resource, sys
from pipelines.ingest.__main__ import main
# As when a disk fills up: no file may grow larger.
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_told_and_what_is_finished_is_kept(
    workers: str, folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for name, height in (("0", 400), ("1", 400), ("large", 2000)):
        picture = rng.integers(0, 256, (height, 1000), dtype=np.uint8)
        (folder / "bee" / f"{name}.png").write_bytes(pictures.encode(picture))
    target = tmp_path / "out"
    words = ["image-folder", str(folder), str(target), "--shard-mib", "1", "--workers", workers]
    full = subprocess.run(
        [sys.executable, "-c", _ON_A_SMALL_DISK, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 2
    assert "cannot be written any more (File too large). Free some space" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (target / "train").exists()
    finished = {path.name for path in target.glob(".train.building/*.mds")}
    assert finished
    before = {name: (target / ".train.building" / name).stat().st_mtime_ns for name in finished}
    assert main(words) == 0
    assert {name: (target / "train" / name).stat().st_mtime_ns for name in finished} == before
    assert len(ShardedDataset(str(target / "train"))) == 13


def test_a_report_that_cannot_be_written_in_the_end_is_not_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert main(["image-folder", str(folder), str(target), "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["verify", str(target / "train"), "--workers", "1", "--report", "/dev/full"]) == 2
    said = capsys.readouterr()
    assert "--report /dev/full cannot be written any more (No space left on device)" in said.err
    report = json.loads(said.out[said.out.index("\n{") :])
    assert report["samples"] == 10


HOSTILE = {
    "nested too deep": b"[" * 100_000,
    "no finite number": b'{"version": 2, "shards": [], "plan": NaN, "classes": [], "skipped": []}',
    "1e999 is no finite number": b'{"version": 2, "plan": 1e999, "shards": []}',
    "is not JSON|not JSON": b'{"version": ' + b"7" * 5000 + b"}",
    "not JSON": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", ["index.json", "ingest.json"])
@pytest.mark.parametrize("words", [*HOSTILE, "more than 268435456"])
def test_documents_that_others_have_written_are_refused_in_a_line(
    name: str, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert main(["image-folder", str(folder), str(target), "--workers", "1"]) == 0
    document = target / "train" / name
    if words in HOSTILE:
        document.write_bytes(HOSTILE[words])
    else:
        os.truncate(document, 1 << 40)  # sparse: a terabyte that takes no space
    capsys.readouterr()
    assert main(["verify", str(target / "train")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line)
    assert name in line
