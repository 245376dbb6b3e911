"""A Hugging Face dataset of a stranger reads no file of somebody else, and stays of sane size."""

import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from pipelines.errors import UnreadableSourceError
from pipelines.ingest.__main__ import main
from pipelines.ingest.huggingface import list_split, load
from pipelines.ingest.huggingface_files import convert
from pipelines.ingest.images import IngestConfig
from tests.unit.pipelines import pictures
from tests.unit.pipelines.pages import tell_less, varint
from tests.unit.pipelines.stored import ingest
from tests.unit.pipelines.test_huggingface import contents, hub_dataset, parquet, saved

MEBIBYTE = 1 << 20
SCHEMA = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def refused(name: str, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["huggingface", name, str(out), "--workers", "1", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert not out.exists()
    return error


def readme(data_files: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: '{data_files}'\n---\n"


def name_in_state(copy: Path, private: Path) -> None:
    saved(hub_dataset(), copy)
    (file,) = (private / "saved").glob("*.arrow")
    state = json.loads((copy / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../private/saved/{file.name}"}]
    (copy / "state.json").write_text(json.dumps(state))


def link_in_saved(copy: Path, private: Path) -> None:
    saved(hub_dataset(), copy)
    (file,), (mine,) = (private / "saved").glob("*.arrow"), copy.glob("*.arrow")
    mine.unlink()
    mine.symlink_to(file)


def name_a_split(copy: Path, _private: Path) -> None:
    copy.mkdir()
    (copy / "dataset_dict.json").write_text('{"splits": ["../private/saved"]}')


def name_in_readme(copy: Path, private: Path) -> None:
    copy.mkdir()
    (copy / "README.md").write_text(readme(f"{private}/*.parquet"))


def climb_in_readme(copy: Path, _private: Path) -> None:
    copy.mkdir()
    (copy / "README.md").write_text(readme("../private/*.parquet"))


def link(copy: Path, private: Path) -> None:
    copy.mkdir()
    (copy / "train.parquet").symlink_to(private / "train.parquet")


@pytest.mark.parametrize(
    "point",
    [name_in_state, link_in_saved, name_a_split, name_in_readme, climb_in_readme, link],
)
def test_files_elsewhere_are_not_read(
    point: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    saved(hub_dataset(), private / "saved")
    parquet(hub_dataset(), private / "train")
    point(tmp_path / "copy", private)
    split = ("--split", "../private/saved", "--write-split", "train")
    options = split if point is name_a_split else ()
    error = refused(str(tmp_path / "copy"), tmp_path / "out", capsys, *options)
    assert "which is no file below that folder, or a link that leads elsewhere" in error


def test_links_of_the_hubs_own_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--mine--pictures"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.move(parquet(hub_dataset(), tmp_path / "train"), blobs / "5e884898")
    (snapshot / "train.parquet").symlink_to("../../blobs/5e884898")
    assert main(["huggingface", str(snapshot), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(contents(tmp_path / "out" / "train")) == 12


def repeated(values: int) -> Any:
    """A table of one large value, again and again."""
    large = pictures.png(9, 7) + bytes(MEBIBYTE)
    images = [{"bytes": large, "path": None}] * values
    return pa.Table.from_pydict({"image": images, "label": [0] * values}, SCHEMA.arrow_schema)


@pytest.mark.slow
def test_a_value_that_is_stored_once_is_not_repeated_without_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = tmp_path / "bomb.parquet"
    pa.parquet.write_table(repeated(200), bomb, compression="zstd", use_dictionary=True)
    assert bomb.stat().st_size < 10_000
    error = refused(str(bomb), tmp_path / "out", capsys)
    assert "bomb.parquet and the other files of its split would become more than" in error
    kept = sum(file.stat().st_size for file in (tmp_path / "hf").rglob("*") if file.is_file())
    assert kept < MEBIBYTE


def test_a_file_that_says_that_it_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = tmp_path / "bomb.parquet"
    pa.parquet.write_table(repeated(200), bomb, compression="zstd", use_dictionary=False)

    def unpack(*_: Any) -> None:
        pytest.fail("it was unpacked")

    monkeypatch.setattr(Parquet, "_generate_tables", unpack)
    assert "would become more than" in refused(str(bomb), tmp_path / "out", capsys)


def one_page(file: Path) -> None:
    images = [{"bytes": pictures.png(9, 7) + bytes(70 * MEBIBYTE), "path": None}]
    table = pa.Table.from_pydict({"image": images, "label": [0]}, SCHEMA.arrow_schema)
    pa.parquet.write_table(table, file, compression="zstd", use_dictionary=False)


def one_dictionary(file: Path) -> None:
    images = [{"bytes": pictures.png(9, 7) + bytes(70 * MEBIBYTE), "path": None}]
    table = pa.Table.from_pydict({"image": images, "label": [0]}, SCHEMA.arrow_schema)
    limit = 100 * MEBIBYTE
    pa.parquet.write_table(table, file, compression="zstd", dictionary_pagesize_limit=limit)


def many_values(file: Path) -> None:
    """One row, whose list says one number over and over."""
    images = [{"bytes": pictures.png(9, 7), "path": None}]
    numbers = pa.array([np.zeros(10_000_000, np.int8)])
    table = pa.table({"image": images, "label": [0], "numbers": numbers})
    pa.parquet.write_table(table, file, data_page_size=100 * MEBIBYTE)


@pytest.mark.parametrize("make", [one_page, one_dictionary, many_values])
def test_a_page_that_says_that_it_unpacks_to_too_much_is_not_unpacked(
    make: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bomb = tmp_path / "bomb.parquet"
    make(bomb)
    tell_less(bomb)
    assert bomb.stat().st_size < 20_000

    def unpack(*_: Any, **__: Any) -> None:
        pytest.fail("it was unpacked")

    monkeypatch.setattr(Parquet, "_generate_tables", unpack)
    assert "would become more than" in refused(str(bomb), tmp_path / "out", capsys)


def test_pages_that_are_damaged_or_shared_by_columns_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.parquet"
    parquet(hub_dataset(), tmp_path / "train")
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\x7f" * 40 + whole[44:])
    error = refused(str(file), tmp_path / "out", capsys)
    assert "train.parquet is a damaged Parquet file (the header of a page" in error
    chunk = pa.parquet.read_metadata(file).row_group(0).column(0)
    honest = varint(chunk.total_compressed_size)
    assert honest in whole[-5000:]
    file.write_bytes(whole.replace(honest, varint(len(whole) + 1, size=len(honest))))
    error = refused(str(file), tmp_path / "out", capsys)
    assert "train.parquet is a damaged Parquet file (the columns are longer" in error


def test_a_zip_archive_is_not_unpacked_without_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with zipfile.ZipFile(copy / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(100):
            archive.writestr(
                f"train/{number % 2}/{number}.png", pictures.png(9, 7) + bytes(MEBIBYTE)
            )
    assert "would become more than" in refused(str(copy), tmp_path / "out", capsys)


def test_files_that_the_library_fetches_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a dataset on the Hub, of which nothing is known before they are fetched."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/0.png", pictures.png(9, 7) + bytes(100 * MEBIBYTE))
    with zipfile.ZipFile(tmp_path / "table.zip", "w") as archive:
        archive.writestr("0.png", pictures.png(9, 7))
        names = ["0.png"] * 100
        table = pa.table({"file_name": names, "text": ["x" * MEBIBYTE] * 100})
        pa.parquet.write_table(table, tmp_path / "metadata.parquet", compression="zstd")
        archive.write(tmp_path / "metadata.parquet", "metadata.parquet")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"image": "", "label": 0}'))

    def unpack(*_: Any, **__: Any) -> None:
        pytest.fail("it was unpacked")

    monkeypatch.setattr(datasets.DownloadManager, "extract", unpack)
    for reader, name, told in (
        ("imagefolder", "bomb.zip", "would become more than"),
        ("imagefolder", "table.zip", "metadata.parquet and the other files"),
        ("json", "train.jsonl.gz", "is compressed"),
        ("csv", "train.jsonl.gz", "is compressed"),
    ):
        builder = datasets.load_dataset_builder(reader, data_files=str(tmp_path / name))
        with pytest.raises(UnreadableSourceError, match=told):
            convert(builder)


def test_compressed_files_and_members_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    bomb = gzip.compress(bytes(MEBIBYTE))
    for packed in ("1.npz", "1.txt.gz", "1.pth"):
        with tarfile.open(copy / "train.tar", "w") as archive:
            for name, data in (("1.png", pictures.png(9, 7)), (packed, bomb)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        assert f"train.tar holds '{packed}'" in refused(str(copy), tmp_path / "out", capsys)
    (copy / "train.tar").write_bytes(gzip.compress((copy / "train.tar").read_bytes()))
    assert "train.tar is no plain .tar" in refused(str(copy), tmp_path / "out", capsys)
    (copy / "train.tar").unlink()
    (copy / "train.jsonl.gz").write_bytes(gzip.compress(b'{"image": "", "label": 0}'))
    assert "train.jsonl.gz is compressed" in refused(str(copy), tmp_path / "out", capsys)


def test_a_table_beside_images_does_not_grow_without_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    names = [f"{number}.png" for number in range(4)]
    for name in names:
        (copy / name).write_bytes(pictures.png(9, 7))
    rows = 100
    table = pa.table(
        {"file_name": [names[row % 4] for row in range(rows)], "text": ["x" * MEBIBYTE] * rows}
    )
    pa.parquet.write_table(table, copy / "metadata.parquet", compression="zstd")
    assert (copy / "metadata.parquet").stat().st_size < MEBIBYTE / 16
    error = refused(str(copy), tmp_path / "out", capsys)
    assert "metadata.parquet and the other files" in error
    assert "would become more than" in error


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_table_is_refused(
    compression: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    saved(hub_dataset(), copy)
    (file,) = copy.glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    with pa.ipc.new_stream(
        str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as writer:
        writer.write_table(table)
    error = refused(str(copy), tmp_path / "out", capsys)
    assert f"{file.name} is an Arrow file whose tables are compressed" in error
    (copy / "state.json").unlink()  # the library then takes it for a repository
    assert "is an Arrow file whose tables are" in refused(str(copy), tmp_path / "out", capsys)


def test_an_arrow_file_with_a_footer_is_refused_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    saved(hub_dataset(), copy)
    (file,) = copy.glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    error = refused(str(copy), tmp_path / "out", capsys)
    assert f"{file.name} is an Arrow file with a footer" in error
    assert "pyarrow.ipc.new_stream or as Parquet" in error
    (copy / "state.json").unlink()  # the library then takes it for a repository
    assert "is an Arrow file with a footer" in refused(str(copy), tmp_path / "out", capsys)
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    assert main(["huggingface", str(copy), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(contents(tmp_path / "out" / "train")) == 12


@pytest.mark.parametrize("cut", [7, 100, 1000])
def test_a_table_that_was_cut_is_refused(
    cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    saved(hub_dataset(), copy)
    (file,) = copy.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-cut])
    error = refused(str(copy), tmp_path / "out", capsys)
    assert "cut" in error or "damaged" in error or "cannot be loaded" in error


def test_a_file_for_another_reader_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.txt").write_text("a line")
    error = refused(str(tmp_path / "copy"), tmp_path / "out", capsys)
    assert "for the reader 'text' of the library" in error


def test_how_rows_are_to_be_shown_is_no_matter(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    saved(hub_dataset(), copy)
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps({**state, "_format_type": "pandas"}))
    assert main(["huggingface", str(copy), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(contents(tmp_path / "out" / "train")) == 12


def truncate(file: Path) -> None:
    os.truncate(file, 100)


def truncate_and_keep_the_time(file: Path) -> None:
    status = file.stat()
    os.truncate(file, 100)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [truncate, truncate_and_keep_the_time, Path.unlink])
def test_a_table_that_is_changed_meanwhile_ends_no_process_and_loses_no_row(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    splits = load(saved(hub_dataset(), copy))
    listing = list_split(splits, "train", image_column="image", label_column="label")
    (file,) = copy.glob("*.arrow")
    change(file)
    lenient = IngestConfig(max_skipped_fraction=1)
    with pytest.raises(UnreadableSourceError, match="was changed while it was taken in"):
        ingest(listing, str(tmp_path / "out"), config=lenient, report=lambda _: None)


@pytest.mark.parametrize(
    "name", ["https://me:hunter2@host/data", "https:/host/data?token=hunter2", "s3://me:hunter2@b"]
)
def test_credentials_in_a_name_are_not_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["huggingface", name, str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "is no name on the Hub" in told.err
    assert "hunter2" not in told.out + told.err
