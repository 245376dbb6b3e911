"""What somebody has put into the folder of an interrupted ingest never becomes a dataset's."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.errors import BadDataError, OccupiedPrefixError
from pipelines.ingest.images import IngestConfig
from pipelines.ingest.listing import list_images
from pipelines.ingest.write import LabelledImage, write_dataset
from tests.unit.pipelines import pictures
from tests.unit.pipelines.stored import ingest

STRICT = IngestConfig(shard_bytes=1000, max_skipped_fraction=0.0)


def go_on(folder: Path, out: Path, *, config: IngestConfig, report: object = None) -> None:
    take = report if callable(report) else lambda _: None
    ingest(list_images(folder), str(out), config=config, report=take)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder with the images of an ingest that a damaged one has ended; its shards are there."""
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(9):
        data = pictures.png(12, 10, seed=number)
        (source / f"{number}.png").write_bytes(data if number else data[:-9])
    with pytest.raises(BadDataError):
        go_on(source, tmp_path / "out", config=STRICT)
    assert len(list((tmp_path / ".out.building").glob("*.record"))) > 2
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_bytes(b"mine")
    return tmp_path


def finish(begun: Path, *, report: object = None) -> None:
    lenient = replace(STRICT, max_skipped_fraction=1.0)
    go_on(begun / "pictures", begun / "out", config=lenient, report=report)


def assert_undisturbed(begun: Path) -> None:
    """Compare with an ingest that had a folder of its own, and look at what lies elsewhere."""
    lenient = replace(STRICT, max_skipped_fraction=1.0)
    go_on(begun / "pictures", begun / "whole", config=lenient)
    names = [sorted(path.name for path in (begun / each).iterdir()) for each in ("out", "whole")]
    assert names[0] == names[1]
    for name in names[0]:
        assert not (begun / "out" / name).is_symlink()
        assert (begun / "out" / name).read_bytes() == (begun / "whole" / name).read_bytes()
    assert not (begun / "out").is_symlink()
    assert [path.name for path in (begun / "elsewhere").iterdir()] == ["mine"]
    assert (begun / "elsewhere" / "mine").read_bytes() == b"mine"


OTHERS = ["shard.00099.mds", "shard.00099.record", "shard.0.mds", "shard.00000.mds.bak", "notes"]
OTHERS += [".hidden", "part.x", ".tmp-mine", "x.record", "\x1b[2Jname"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_ingest_writes_is_refused_and_left_alone(name: str, begun: Path) -> None:
    other = begun / ".out.building" / name
    shutil.copy(begun / ".out.building" / "shard.00001.mds", other)
    before = other.read_bytes()
    with pytest.raises(OccupiedPrefixError, match="which this ingest has not written") as raised:
        finish(begun)
    assert str(raised.value).isprintable()
    assert other.read_bytes() == before
    assert not (begun / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in other.parent.glob("shard.0000[1-9].mds")}
    other.unlink()
    finish(begun)
    assert_undisturbed(begun)
    changed = {name for name in kept if (begun / "out" / name).stat().st_mtime_ns != kept[name]}
    assert len(changed) <= 1  # that with the damaged image


def test_folders_in_it_are_refused_and_left_alone(begun: Path) -> None:
    inside = begun / ".out.building" / "pictures" / "mine"
    inside.mkdir(parents=True)
    with pytest.raises(OccupiedPrefixError, match="'pictures', which this ingest has not written"):
        finish(begun)
    # Also by an ingest of other images, which keeps no shard.
    (begun / "pictures" / "1.png").unlink()
    with pytest.raises(OccupiedPrefixError, match="'pictures', which this ingest has not written"):
        finish(begun)
    with pytest.raises(OccupiedPrefixError, match="'pictures', which this ingest has not written"):
        write_dataset([LabelledImage(pictures.png(9, 7), 0)], str(begun / "out"))
    assert inside.is_dir()
    assert list((begun / ".out.building").glob("*.mds"))


def _file(path: Path) -> None:
    path.write_bytes(b"any")


def _folder(path: Path) -> None:
    (path / "inside").mkdir(parents=True)


def _link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "elsewhere")


def _link_to_file(path: Path) -> None:
    path.symlink_to(path.parent.parent / "elsewhere" / "mine")


DRAFT = ".tmp-" + "0" * 32


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *[("part.00001", make) for make in (_file, _link, _link_to_file, _folder)],
        *[
            (name, make)
            for name in ("index.json", "ingest.json", "latents.json", DRAFT)
            for make in (_folder, _link, _link_to_file, _file)
        ],
        *[("plan.json", make) for make in (_folder, _link, _link_to_file)],
    ],
)
def test_what_is_of_another_kind_than_an_ingest_writes_is_replaced(
    name: str, make: Callable[[Path], None], begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = begun / ".out.building" / name
    place.unlink(missing_ok=True)
    make(place)
    finish(begun)
    assert_undisturbed(begun)
    as_written = make is (_folder if name.startswith("part.") else _file)
    told = [each.getMessage() for each in caplog.records if str(place) in each.getMessage()]
    assert len(told) == (0 if as_written else 1)


def _linked_copy(work: Path) -> None:
    shutil.copytree(work, work.parent / "copy")
    shutil.rmtree(work)
    work.symlink_to(work.parent / "copy")


def _file_instead(work: Path) -> None:
    shutil.rmtree(work)
    work.write_bytes(b"mine")


@pytest.mark.parametrize(
    ("make", "told"), [(_linked_copy, "is a link"), (_file_instead, "is a file")]
)
def test_what_is_no_folder_is_refused_and_left_alone(
    make: Callable[[Path], None], told: str, begun: Path
) -> None:
    work = begun / ".out.building"
    make(work)
    with pytest.raises(OccupiedPrefixError, match=told):
        finish(begun)
    with pytest.raises(OccupiedPrefixError, match=told):
        write_dataset([LabelledImage(pictures.png(9, 7), 0)], str(begun / "out"))
    assert work.is_symlink() or work.read_bytes() == b"mine"
    work.unlink()
    finish(begun)
    assert_undisturbed(begun)


def test_what_is_put_there_meanwhile_does_not_become_part_of_the_dataset(begun: Path) -> None:
    other = begun / ".out.building" / "shard.00099.mds"
    with pytest.raises(OccupiedPrefixError, match=r"'shard.00099.mds', which this ingest has not"):
        finish(begun, report=lambda _: other.write_bytes(b"mine"))
    assert other.read_bytes() == b"mine"
    assert not (begun / "out").exists()
    other.unlink()
    finish(begun)
    assert_undisturbed(begun)

    def images() -> Iterator[LabelledImage]:
        yield LabelledImage(pictures.png(9, 7), 0)
        (begun / ".second.building" / "notes").write_bytes(b"mine")

    with pytest.raises(OccupiedPrefixError, match="'notes', which this ingest has not"):
        write_dataset(images(), str(begun / "second"))
    assert not (begun / "second").exists()


@pytest.mark.parametrize("to", ["elsewhere", "empty", "nowhere"])
def test_a_link_in_the_datasets_place_is_refused_before_anything_is_written(
    to: str, begun: Path
) -> None:
    (begun / "empty").mkdir()
    (begun / "out").symlink_to(begun / to)
    with pytest.raises(OccupiedPrefixError, match="out is a link, so it is left alone"):
        finish(begun)
    with pytest.raises(OccupiedPrefixError, match="out is a link, so it is left alone"):
        write_dataset([LabelledImage(pictures.png(9, 7), 0)], str(begun / "out"))
    assert (begun / "out").is_symlink()
