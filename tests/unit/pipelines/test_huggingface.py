"""From a copy of a Hugging Face dataset in a folder to one of shards, byte by byte."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from pipelines.errors import CorruptShardError, UnreadableSourceError
from pipelines.ingest.__main__ import main
from pipelines.ingest.about import read_about
from pipelines.ingest.huggingface import list_split, load
from pipelines.ingest.images import IngestConfig
from pipelines.shards import ShardedDataset
from tests.unit.pipelines import pictures
from tests.unit.pipelines.stored import ingest

NAMES = ["ant", "bee", "cow"]
IMAGES = [pictures.png(9, 7, seed=seed) for seed in range(12)]
LABELS = [seed % 3 for seed in range(12)]
SMALL = IngestConfig(shard_bytes=4 * max(map(len, IMAGES)))


def hub_dataset(images: list[Any] | None = None, labels: list[Any] | None = None) -> Any:
    """As they lie on the Hub: encoded images, and labels with names."""
    given = {
        "image": [{"bytes": data, "path": None} for data in IMAGES] if images is None else images,
        "label": LABELS if labels is None else labels,
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    return datasets.Dataset.from_dict(given, features=features)


def saved(dataset: Any, folder: Path) -> str:
    dataset.save_to_disk(str(folder))
    return str(folder)


def saved_splits(dataset: Any, folder: Path) -> str:
    return saved(datasets.DatasetDict({"train": dataset, "test": dataset.select([0, 1])}), folder)


def parquet(dataset: Any, folder: Path) -> str:
    dataset.to_parquet(str(folder.with_suffix(".parquet")))
    return str(folder.with_suffix(".parquet"))


def repository(dataset: Any, folder: Path) -> str:
    """A clone of a repository on the Hub."""
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return str(folder)


def contents(prefix: Path) -> list[tuple[bytes, int]]:
    dataset = ShardedDataset(str(prefix))
    samples = [dataset.read(place) for place in range(len(dataset))]
    return sorted((sample.data, sample.label) for sample in samples)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library converts to Arrow it keeps; not in the user's folder, and not elsewhere."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("store", [saved, saved_splits, parquet, repository])
def test_every_kind_of_copy_gives_the_same_bytes_and_classes(
    store: Callable[[Any, Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = store(hub_dataset(), tmp_path / "copy")
    command = ["huggingface", name, str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    assert "12 images of 3 classes in the split train" in capsys.readouterr().out
    assert contents(tmp_path / "out" / "train") == sorted(zip(IMAGES, LABELS, strict=True))
    about = read_about(str(tmp_path / "out" / "train"))
    assert about is not None
    assert about.classes == tuple(NAMES)
    assert about.images_per_class == (4, 4, 4)
    assert main(["verify", str(tmp_path / "out" / "train"), "--workers", "1"]) == 0
    assert main(command) == 0
    assert "complete, nothing to do" in capsys.readouterr().out


def test_splits_columns_and_held_out_images_are_chosen(tmp_path: Path) -> None:
    renamed = hub_dataset().rename_columns({"image": "img", "label": "fine"})
    name = saved_splits(renamed, tmp_path / "copy")
    columns = ["--image-column", "img", "--label-column", "fine", "--workers", "1"]
    out = tmp_path / "out"
    assert main(["huggingface", name, str(out / "one"), *columns, "--split", "test"]) == 0
    assert contents(out / "one" / "test") == sorted(zip(IMAGES[:2], LABELS[:2], strict=True))
    assert main(["huggingface", name, str(out / "two"), *columns, "--hold-out", "0.25"]) == 0
    train, test = contents(out / "two" / "train"), contents(out / "two" / "test")
    assert sorted(train + test) == sorted(zip(IMAGES, LABELS, strict=True))
    assert sorted(label for _, label in test) == [0, 1, 2]


def test_labels_without_names_are_numbered_alike_in_all_splits() -> None:
    def split(labels: list[str]) -> Any:
        return datasets.Dataset.from_dict({"image": IMAGES[: len(labels)], "label": labels})

    splits = {"train": split(["wasp", "ant"]), "test": split(["bee", "wasp"])}
    for name, labels in (("train", [2, 0]), ("test", [1, 2])):
        listing = list_split(splits, name, image_column="image", label_column="label")
        assert listing.classes == ("ant", "bee", "wasp")
        assert [image.label for image in listing.images] == labels
        assert [image.read() for image in listing.images] == IMAGES[:2]
        assert [image.size for image in listing.images] == [len(data) for data in IMAGES[:2]]


def test_rows_without_an_image_are_left_out_and_named(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": data, "path": None} for data in IMAGES]
    images[3], images[7] = None, {"bytes": b"no picture", "path": "holiday.jpg"}
    name = saved(hub_dataset(images), tmp_path / "copy")
    command = ["huggingface", name, str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 2
    assert not (tmp_path / "out" / "train").exists()
    assert main([*command, "--max-skipped-fraction", "0.2"]) == 0
    about = read_about(str(tmp_path / "out" / "train"))
    assert about is not None
    assert [row for row, _ in about.skipped] == ["row 3", "row 7 (holiday.jpg)"]
    assert len(contents(tmp_path / "out" / "train")) == 10


def test_an_interrupted_ingest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(hub_dataset(), tmp_path / "copy")

    def listing() -> Any:
        return list_split(load(name), "train", image_column="image", label_column="label")

    ingest(listing(), str(tmp_path / "whole"), config=SMALL, report=lambda _: None)

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.ingest.plan._REPORT_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        ingest(listing(), str(tmp_path / "out"), config=SMALL, report=stop)
    (first,) = (tmp_path / ".out.building").glob("*.mds")
    written_ns = first.stat().st_mtime_ns
    assert not (tmp_path / "out").exists()
    ingest(listing(), str(tmp_path / "out"), config=SMALL, report=lambda _: None)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == written_ns
    ingest(listing(), str(tmp_path / "out"), config=SMALL, report=lambda _: None)
    (tmp_path / "out" / first.name).write_bytes(b"cut")
    with pytest.raises(CorruptShardError, match=r"shard\.\d+\.mds is gone or was cut"):
        ingest(listing(), str(tmp_path / "out"), config=SMALL, report=lambda _: None)


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path: Path) -> None:
    splits = load(saved(hub_dataset(), tmp_path / "copy"))
    listing = list_split(splits, "train", image_column="image", label_column="label")
    for workers in (1, 2):
        config = replace(SMALL, workers=workers)
        ingest(listing, str(tmp_path / f"{workers}"), config=config, report=lambda _: None)
    assert len(list((tmp_path / "1").glob("*.mds"))) > 2
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--split validation", "There is no split 'validation'; the dataset has train"),
        ("--image-column img", "no column 'img'; its columns are image, label"),
        ("--label-column class", "no column 'class'; its columns are image, label"),
        ("--image-column label", "The column 'label' holds ClassLabel"),
        ("--label-column image", "The column 'image' holds struct"),
        ("--revision main", "--revision main cannot be chosen in"),
        ("--config-name plain", "--config-name plain cannot be chosen in"),
        ("--workers 0", "workers=0 must be at least 1"),
        ("--hold-out 1", r"--hold-out 1.0 must lie in [0, 1)"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = saved(hub_dataset(), tmp_path / "copy")
    capsys.readouterr()
    assert main(["huggingface", name, str(tmp_path / "out"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_places_without_a_dataset_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    for name, message in (
        (str(tmp_path / "broken.parquet"), "Give a folder or .parquet file"),
        ("/no/such/folder", "Give a folder or .parquet file"),
        ("nobody/nothing", "hf download --repo-type dataset nobody/nothing"),
    ):
        assert main(["huggingface", name, str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.splitlines()[-1].startswith("error: The dataset")


def test_a_row_without_a_label_is_refused() -> None:
    dataset = hub_dataset(labels=[-1, *LABELS[1:]])
    with pytest.raises(UnreadableSourceError, match=r"Row 0 .* the label -1, which is no class"):
        list_split({"test": dataset}, "test", image_column="image", label_column="label")


@pytest.mark.parametrize("column", ["image", "label"])
def test_texts_that_are_none_are_refused(
    column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.parquet"
    images = [{"bytes": image, "path": "PICTURE.png"} for image in IMAGES[:2]]
    types = {"image": datasets.Image(), "label": datasets.Value("string")}
    schema = datasets.Features(types).arrow_schema
    columns = {"image": images, "label": ["a", "MARKED"]}
    table = pyarrow.Table.from_pydict(columns, schema)
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False)
    marked = b"PICTURE" if column == "image" else b"MARKED"
    # Also in the statistics, which hold the largest value.
    file.write_bytes(file.read_bytes().replace(marked, b"\xff" + marked[1:]))
    assert main(["huggingface", str(file), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"The column '{column}' is damaged" in error
    assert "Traceback" not in error


def test_unknown_labels_of_another_split_shift_no_class() -> None:
    def split(labels: list[int]) -> Any:
        return datasets.Dataset.from_dict({"image": IMAGES[: len(labels)], "label": labels})

    splits = {"train": split([0, 1, 2]), "test": split([-1, -1])}
    listing = list_split(splits, "train", image_column="image", label_column="label")
    assert listing.classes == ("0", "1", "2")
    assert [image.label for image in listing.images] == [0, 1, 2]
    with pytest.raises(UnreadableSourceError, match=r"Row 0 .* the label -1, which is no class"):
        list_split(splits, "test", image_column="image", label_column="label")
    mixed = {"train": split([0, 1]), "test": datasets.Dataset.from_dict({"label": ["a"]})}
    with pytest.raises(UnreadableSourceError, match="numbers in some splits and texts in others"):
        list_split(mixed, "train", image_column="image", label_column="label")


def test_rows_reach_no_file_outside_of_the_dataset(tmp_path: Path) -> None:
    copy, secret = tmp_path / "copy", tmp_path / "secret.png"
    copy.mkdir()
    secret.write_bytes(IMAGES[0])
    (copy / "mine.png").write_bytes(IMAGES[1])
    (copy / "link.png").symlink_to(secret)
    (copy / "folder.png").mkdir()
    with (copy / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    paths = [
        *(str(secret), "../secret.png", "link.png", str(copy / "link.png"), "folder.png"),
        *("/dev/zero", "/proc/self/environ", "huge.png", "no\0thing", "x" * 5000, "mine.png"),
        str(copy / "mine.png"),
    ]
    images = [{"bytes": None, "path": path} for path in paths]
    schema = hub_dataset().features.arrow_schema
    table = pyarrow.Table.from_pydict({"image": images, "label": [0] * len(images)}, schema)
    pyarrow.parquet.write_table(table, copy / "data.parquet")
    name = str(copy / "data.parquet")
    out = tmp_path / "out"
    command = ["huggingface", name, str(out), "--workers", "1", "--max-skipped-fraction", "0.9"]
    assert main(command) == 0
    assert [data for data, _ in contents(out / "train")] == [IMAGES[1]] * 2
    about = read_about(str(out / "train"))
    assert about is not None
    assert len(about.skipped) == 10
    reasons = {reason for _, reason in about.skipped}
    assert any("no file below the dataset's folder" in reason for reason in reasons)
    assert all(name.isprintable() for name, _ in about.skipped)
