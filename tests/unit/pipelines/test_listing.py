"""Which class an image belongs to, by where it lies."""

from pathlib import Path

import pytest

from pipelines.ingest.__main__ import main
from pipelines.ingest.listing import UnreadableSourceError, list_images
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
