"""Which class an image belongs to, by where it lies."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UnreadableSourceError
from pipelines.ingest.__main__ import main
from pipelines.ingest.listing import list_images
from pipelines.shards import ShardedDataset
from tests.unit.pipelines import pictures


def place(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures.jpeg(20, 24, seed=number))


def test_a_folder_of_nothing_but_images_is_one_class(tmp_path: Path) -> None:
    place(tmp_path / "holiday", "b.jpg", "a.JPEG", "c.png")
    (tmp_path / "holiday" / "notes.txt").write_text("not an image")
    listing = list_images(tmp_path / "holiday")
    assert listing.classes == ("holiday",)
    assert [image.name for image in listing.images] == ["a.JPEG", "b.jpg", "c.png"]
    assert {image.label for image in listing.images} == {0}


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    place(tmp_path, "cat/1.jpg", "stray.jpg")
    with pytest.raises(UnreadableSourceError, match=r"'stray\.jpg' beside the class 'cat'"):
        list_images(tmp_path)


def test_folders_need_not_mean_classes(tmp_path: Path) -> None:
    place(tmp_path / "all", "2024/june/1.jpg", "2024/2.jpg", "2025/1.jpg", "2025/3.jpg")
    assert list_images(tmp_path / "all").classes == ("2024", "2025")
    place(tmp_path / "all", "stray.png")
    out = tmp_path / "out"
    command = ["image-folder", str(tmp_path / "all"), str(out), "--one-class", "--hold-out", "0.2"]
    assert main([*command, "--workers", "1"]) == 0
    splits = [ShardedDataset(str(out / split)) for split in ("train", "test")]
    assert [len(split) for split in splits] == [4, 1]
    assert {split.read(n).label for split in splits for n in range(len(split))} == {0}


def listed(root: Path, **options: Any) -> list[tuple[str, str]]:
    """Each image with its class."""
    listing = list_images(root, **options)
    return [(image.name, listing.classes[image.label]) for image in listing.images]


def test_what_is_not_taken_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    place(source, "ant/1.jfif", "ant/2.jpe", "bee/1.JPG", "bee/deep/2.png", ".thumbs/1.jpg")
    place(tmp_path, "elsewhere/1.jpg")
    for number in range(6):
        (source / "ant" / f"{number}.bmp").write_bytes(b"BM")
    place(source, "vanished/1.webp", "vanished/2.webp")
    (source / "cat.zip").write_bytes(b"PK")
    (source / "dog.tar.gz").write_bytes(b"\x1f\x8b")
    (source / "empty").mkdir()
    (source / "ant" / ".DS_Store").touch()
    (source / "ant" / "README").touch()
    (source / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    (source / "bee" / "9.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    os.mkfifo(source / "bee" / "8.jpg")
    with (source / "bee" / "7.jpg").open("wb") as file:
        file.truncate(1 << 40)
    command = ["image-folder", str(source), str(out), "--workers", "1"]
    passed = (
        "6 .bmp, 2 .webp, 1 .tar.gz, 1 .zip, 1 empty folder, 1 hidden file, 1 hidden folder, "
        "1 imageless folder, 1 linked file, 1 linked folder, 1 other file, 1 oversized file, "
        "1 special file"
    )
    assert main([*command, "--strict"]) == 2
    assert f"holds what is not taken: {passed}. Remove" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 images of 2 classes" in said
    assert f"passed over: {passed}\n" in said
    about = json.loads((out / "train" / "ingest.json").read_text())
    assert about["passed_over"][0] == [".bmp", 6]
    assert main(["verify", str(out / "train"), "--workers", "1"]) == 0
    assert f"passed over at ingest: {passed}\n" in capsys.readouterr().out


def test_with_nothing_passed_over_strict_is_content(tmp_path: Path) -> None:
    place(tmp_path / "in", "ant/1.jpg", "bee/2.jpg")
    command = ["image-folder", str(tmp_path / "in"), "--strict", "--workers", "1"]
    assert main([*command[:2], str(tmp_path / "out"), *command[2:]]) == 0
    (tmp_path / "in" / "ant" / "3.jpg").write_bytes(b"no image")
    assert main([*command[:2], str(tmp_path / "other"), *command[2:]]) == 2


def test_links_are_followed_on_demand_and_not_in_circles(tmp_path: Path) -> None:
    place(tmp_path, "in/ant/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "in" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "ant" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in" / "ant")
    (tmp_path / "in" / "ant" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert listed(tmp_path / "in") == [("ant/1.jpg", "ant")]
    with_links = dict(listed(tmp_path / "in", follow_links=True))
    assert with_links["bee/2.jpg"] == "bee"
    assert len(with_links) == 3  # bee/back/1.jpg too


def test_the_class_is_the_outermost_folder_but_for_one_around_all(tmp_path: Path) -> None:
    place(tmp_path, "a/n1/images/x.jpg", "a/n1/images/y.jpg", "a/n2/images/x.jpg", "a/n3/x.jpg")
    assert {name for _, name in listed(tmp_path / "a")} == {"n1", "n2", "n3"}
    listing = list_images(tmp_path)
    assert listing.classes == ("n1", "n2", "n3")
    assert listing.summary == "4 images of 3 classes, which are the folders in a"
    assert list_images(tmp_path / "a" / "n1").classes == ("images",)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/ant/1.jpg", "val/ant/1.jpg"], "folders train and val, which look like splits"),
        (["ds/Train/1.jpg", "ds/test/1.jpg"], "folders Train and test, which look like splits"),
        (["images/1.jpg", "images/2.jpg", "labels.csv"], "'labels.csv', which looks like a table"),
        (["a/1.jpg", "b/2.jpg", "metadata.jsonl"], "'metadata.jsonl', which looks like a table"),
        (["1.jpg", "2.jpg", "anything.tsv"], "'anything.tsv', which looks like a table"),
    ],
)
def test_layouts_that_are_no_classes_are_told_with_the_way_out(
    names: list[str], words: str, tmp_path: Path
) -> None:
    place(tmp_path, *names)
    with pytest.raises(UnreadableSourceError, match=f"{words}.*--as-classes"):
        list_images(tmp_path)
    images = [name for name in names if name.endswith(".jpg")]
    assert len(list_images(tmp_path, classes_from="folders anyway").images) == len(images)
    assert len(list_images(tmp_path, classes_from="nothing").images) == len(images)


def test_other_tables_beside_classes_are_only_counted(tmp_path: Path) -> None:
    place(tmp_path, "a/1.jpg", "b/2.jpg", "licences.csv", "train/3.jpg")
    listing = list_images(tmp_path)
    assert listing.classes == ("a", "b", "train")
    assert listing.passed_over == ((".csv", 1),)


def webdataset(path: Path, labels: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            for suffix, data in (
                ("jpg", pictures.jpeg(9, 9, seed=number)),
                ("cls", label.encode()),
            ):
                info = tarfile.TarInfo(f"{path.stem}-{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_shards_of_webdataset_are_no_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    webdataset(tmp_path / "in" / "000.tar", ["10", "2\n", "2"])
    webdataset(tmp_path / "in" / "001.tar", ["0", "10"])
    command = ["image-folder", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 2
    assert "looks like a shard of webdataset" in capsys.readouterr().err
    listing = list_images(tmp_path / "in", classes_from="cls files")
    assert listing.classes == ("0", "2", "10")
    assert [image.label for image in listing.images] == [0, 1, 1, 2, 2]
    names = tuple(f"class {number}" for number in range(11))
    listing = list_images(tmp_path / "in", classes_from="cls files", classes=names)
    assert [image.label for image in listing.images] == [0, 2, 2, 10, 10]
    assert main([*command, "--webdataset"]) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", "file_name,label\nimages/1.jpg,cat\nimages/2.jpg,dog\n3.jpg,cat\n"),
        ("labels.csv", "\ufeffID , Breed,x\r\n1,cat,5\r\n2,dog,6\r\n3,cat,7\r\n"),
        ("labels.tsv", "label\tpath\ncat\t1.jpg\ndog\t./images/2.jpg\ncat\timages/3.jpg\n"),
        (
            "metadata.jsonl",
            '{"file_name": "images/1.jpg", "label": "cat"}\n\n'
            '{"label": "dog", "file_name": "2.jpg", "text": "…"}\n'
            '{"file_name": "3", "label": "cat"}',
        ),
    ],
)
def test_labels_are_read_from_a_table(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(tmp_path / "in", "images/1.jpg", "images/2.jpg", "images/3.jpg")
    (tmp_path / "in" / name).write_text(content, newline="")
    command = ["image-folder", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 2
    assert f"--labels {tmp_path / 'in' / name}" in capsys.readouterr().err
    assert main([*command, "--labels", str(tmp_path / "in" / name)]) == 0
    assert "3 images of 2 classes" in capsys.readouterr().out
    found = listed(tmp_path / "in", classes_from=tmp_path / "in" / name)
    assert found == [
        ("images/1.jpg", "cat"),
        ("images/3.jpg", "cat"),
        ("images/2.jpg", "dog"),
    ]


def test_a_table_is_a_file_of_bounded_size(tmp_path: Path) -> None:
    place(tmp_path / "in", "1.jpg")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    with (tmp_path / "huge.tsv").open("wb") as file:
        file.truncate(1 << 40)
    for name, words in (
        ("pipe.csv", "no regular file"),
        ("endless.jsonl", "no regular file"),
        ("huge.tsv", "it has 1099511627776 bytes"),
    ):
        with pytest.raises(UnreadableSourceError, match=words):
            list_images(tmp_path / "in", classes_from=tmp_path / name)


def test_rows_and_images_without_the_other_are_counted_and_no_other_file_is_reached(
    tmp_path: Path,
) -> None:
    place(tmp_path, "secret/9.jpg", "in/1.jpg", "in/a/2.jpg", "in/b/2.jpg", "in/3.jpg")
    table = tmp_path / "in" / "t.csv"
    secret = tmp_path / "secret" / "9.jpg"
    table.write_text(
        f"path,label\n1.jpg,7\n{secret},7\n../secret/9.jpg,8\n2.jpg,7\na/2.jpg,11\n3.jpg,\n"
    )
    listing = list_images(tmp_path / "in", classes_from=table)
    assert [(image.name, image.label) for image in listing.images] == [("1.jpg", 0), ("a/2.jpg", 1)]
    assert listing.classes == ("7", "11")
    # "2.jpg" is the name of two images, and "3.jpg" has no label.
    assert dict(listing.passed_over) == {".csv": 1, "unlabelled image": 2, "unmatched label": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file_name,label\n1.jpg,cat\nimages/1.jpg,dog\n", "'images/1.jpg' two labels, 'cat' and"),
        ("file_name,label\n", "None of the 1 images"),
        ("file_name,label\n7.jpg,cat\n", "None of the 1 images"),
        ("file_name,label\n1.jpg,-1\n", "The label -1 is no class"),
        ("picture,kind\n1.jpg,cat\n", "its columns are picture, kind"),
        ("", "its columns are"),
        ("file_name,label\n1.jpg\n", "None of the 1 images"),
        ("file_name,label\n" + "x" * 200_000 + ",cat\n", "field larger than"),
        ("file_name,label\n1.jpg,\x1b[31mred\n", None),
    ],
)
def test_tables_that_cannot_be_used_are_refused(
    content: str, words: str | None, tmp_path: Path
) -> None:
    place(tmp_path, "images/1.jpg")
    (tmp_path / "t.csv").write_text(content)
    if words is None:
        assert list_images(tmp_path, classes_from=tmp_path / "t.csv").classes == (r"\x1b[31mred",)
        return
    with pytest.raises(UnreadableSourceError, match=re.escape(words)):
        list_images(tmp_path, classes_from=tmp_path / "t.csv")


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[1]", '{"file_name": 1, "label": "a"}', '{"file_name": "1.jpg"}', "{", "\xff"],
)
def test_lines_that_are_no_rows_are_refused(content: str, tmp_path: Path) -> None:
    place(tmp_path, "images/1.jpg")
    (tmp_path / "t.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(UnreadableSourceError, match=r"t\.jsonl cannot be read"):
        list_images(tmp_path, classes_from=tmp_path / "t.jsonl")


@pytest.mark.slow
def test_names_that_are_no_text_or_that_terminals_obey_are_escaped(tmp_path: Path) -> None:
    """In a locale where standard output takes no other bytes, too."""
    source = os.fsencode(tmp_path / "in")
    for name in (b"caf\xe9", b"new\nline", b"\x1b[31mred", b"plain"):
        os.makedirs(source + b"/" + name)
        with open(source + b"/" + name + b"/\xff\x1b]0;title\x07.jpg", "wb") as file:
            file.write(pictures.jpeg(9, 9, seed=len(name)))
    with open(source + b"/plain/bad\xff\r\x1b[2J.jpg", "wb") as file:
        file.write(b"no image")
    words = ["image-folder", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    environment = {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": ":".join(sys.path)}
    for command in ([*words, "--max-skipped-fraction", "0.5"], ["verify", f"{words[2]}/train"]):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.ingest", *command],
            capture_output=True,
            check=False,
            cwd=Path(__file__).parents[3],
            env={**os.environ, **environment},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert not set(done.stdout) & set(b"\x1b\x07\r\xff\xe9")
    assert rb"0 \x1b[31mred" in done.stdout
    assert rb"1 caf\udce9" in done.stdout
    assert rb"2 new\nline" in done.stdout


def test_a_refusal_is_one_line_whatever_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(tmp_path, "in/new\nline/\x1b[31m.jpg", "in/bee/1.jpg")
    (tmp_path / "in" / "new\nline" / "\x1b[31m.jpg").write_bytes(b"no image")
    assert main(["image-folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert r"the first is new\nline/\x1b[31m.jpg" in error
    assert error.count("\n") == 1
