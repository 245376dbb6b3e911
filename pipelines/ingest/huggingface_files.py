"""The files of a Hugging Face dataset, looked at before the library `datasets` opens them.

Whoever made a dataset chose which files it names: in README.md, in state.json, and by links. Of
these only regular files below the dataset's own folders are read. And a small file may promise any
number of bytes, so what it becomes is bounded by its size.
"""

import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.console import visible
from pipelines.documents import read_json
from pipelines.errors import UnreadableSourceError
from pipelines.ingest.listing import IMAGES
from pipelines.ingest.parquet_pages import promised_bytes

# What `save_to_disk` of the library leaves in a folder: of a dataset with splits, of one without.
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_READERS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")
"""Those of the library that may hold images, and follow no names to other files."""

_FREE_BYTES = 1 << 26
_MAX_GROWTH = 100
"""So many bytes, and for each byte that a file has so many more, may it become; images grow by
little, for they are compressed already.
"""

_ROWS_AT_A_TIME = 16  # each of which may repeat one large value that is stored once
# What compressed files begin with, and how they are called: gzip, bzip2, xz, zstd, lz4, 7z, rar.
_PACKED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22M\x18",
    b"7z\xbc",
    b"Rar!",
)
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".npz", ".pt", ".pth")
_WITH_FOOTER = b"ARROW1"
_SCHEMA, _RECORD_BATCH = 1, 3  # kinds of Arrow's messages


def is_saved(place: Path) -> bool:
    """Tell whether a folder is what `save_to_disk` of the library leaves."""
    return (place / _DICT).is_file() or (place / _STATE).is_file()


def check_saved(place: Path) -> None:
    """Look at what `save_to_disk` left, before the library believes it.

    Raises:
        UnreadableSourceError: It names a file elsewhere, or one that is packed.
        OSError: Something is missing.
        DocumentError: Something is no JSON that is read here.
    """
    folders = folders_below(place)
    parts = [place] if (place / _STATE).is_file() else []
    if (place / _DICT).is_file():
        splits = read_json(_own_file(place / _DICT, folders))["splits"]
        parts += [place / str(split) for split in splits]
    for part in parts:
        _own_file(part / _INFO, folders)
        for entry in read_json(_own_file(part / _STATE, folders))["_data_files"]:
            _refuse_packed(_own_file(part / entry["filename"], folders))


def convert(builder: Any, *, folder: Path | None = None) -> Any:
    """Have the library convert a dataset to files of its own, which it maps into memory.

    Args:
        builder: What the library has found out about it.
        folder: The local folder that it lies in; None if it does not.

    Raises:
        UnreadableSourceError: It names a file elsewhere, is of a kind that is not read here, or
            would become far larger than it is.
    """
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in _READERS:
        raise UnreadableSourceError(
            f"The dataset holds files for the reader {visible(reader)!r} of the library "
            f"`datasets`; give one of {', '.join(_READERS)}."
        )
    if folder is not None:
        named = (builder.config.data_files or {}).values()
        for file in (file for some in named for file in some):
            _own_file(Path(file), folders_below(folder))
    generate_splits = builder._split_generators
    builder._split_generators = lambda manager: generate_splits(_look_when_fetched(manager, reader))
    if reader in ("arrow", "parquet"):
        look, generate = _LOOKS[reader], builder._generate_tables
        if reader == "parquet":
            builder.config.batch_size = _ROWS_AT_A_TIME
        builder._generate_tables = lambda files, **others: _bound_growth(
            [*map(Path, files)], look, lambda: generate(files=files, **others)
        )
    if reader == "webdataset":
        read = builder._get_pipeline_from_tar
        builder._get_pipeline_from_tar = lambda path, members: _look_first(path, members, read)
    builder.download_and_prepare()
    return builder.as_dataset()


def _look_when_fetched(manager: Any, reader: str) -> Any:
    """Have files looked at as soon as the library has them, before it unpacks any."""
    download = manager.download

    def fetch(named: Any) -> Any:
        fetched = download(named)
        _look_at([*_paths_in(fetched)], reader)
        return fetched

    manager.download = fetch
    return manager


def _paths_in(fetched: Any) -> Iterator[Path]:
    if isinstance(fetched, str):
        yield Path(fetched)
    else:
        for each in fetched.values() if isinstance(fetched, dict) else fetched:
            yield from _paths_in(each)


def _look_at(files: Sequence[Path], reader: str) -> None:
    """Refuse files that would become far larger, of those that are not looked at when read.

    Raises:
        UnreadableSourceError: Some would, or are compressed.
    """
    if files:
        _refuse_growth(files, sum(map(_unpacked_bytes, files)))
    if reader in _LOOKS:
        return
    # Such as the table beside the images of a folder, which may be in an archive with them.
    for file in files:
        if file.suffix.lower() == ".parquet":
            _refuse_growing_table(file)
        elif _may_be_packed(file) and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory() as scratch:
                for member in archive.infolist():
                    if member.filename.lower().endswith(".parquet"):
                        _refuse_growing_table(Path(archive.extract(member, scratch)))


def _may_be_packed(file: Path) -> bool:
    return file.suffix.lower() not in (*IMAGES.suffixes, ".parquet", ".arrow", ".tar")


def _bound_growth(
    files: Sequence[Path],
    look: Callable[[Path], int],
    generate: Callable[[], Iterable[tuple[Any, Any]]],
) -> Iterator[tuple[Any, Any]]:
    """Pass tables on while they hold no more than files of that size may become.

    Args:
        files: The files.
        look: Says how many bytes one of them promises to hold.
        generate: Reads them, giving a key and a table again and again.

    Raises:
        UnreadableSourceError: They promise more, or hold more.
    """
    _refuse_growth(files, sum(map(look, files)))
    found = 0
    for key, table in generate():
        found += table.nbytes
        _refuse_growth(files, found)
        yield key, table


def _refuse_growth(files: Sequence[Path], found: int) -> None:
    allowed = _FREE_BYTES + _MAX_GROWTH * sum(file.stat().st_size for file in files)
    if found > allowed:
        raise UnreadableSourceError(
            f"{visible(files[0].name)} and the other files of its split would become more than "
            f"{allowed:,} bytes, {_MAX_GROWTH} times what they take, which images do not. Get the "
            "dataset from elsewhere, or leave out the file."
        )


def _unpacked_bytes(file: Path) -> int:
    """Say how many bytes a zip archive holds, which the library would unpack; 0 for no archive.

    Raises:
        UnreadableSourceError: It is compressed in another way, which does not tell.
    """
    if not _may_be_packed(file):
        return 0
    with file.open("rb") as opened:
        head = opened.read(max(map(len, _PACKED)))
    if head.startswith(_PACKED):
        raise UnreadableSourceError(
            f"{visible(file.name)} is compressed, and what it holds may be of any size. Unpack it."
        )
    if not zipfile.is_zipfile(file):
        return 0
    with zipfile.ZipFile(file) as archive:
        return sum(member.file_size for member in archive.infolist())


def _look_first(path: str, members: Iterable[Any], read: Callable[..., Iterable[Any]]) -> Any:
    """Look at the headers of an archive of webdataset before its members are read.

    Raises:
        UnreadableSourceError: One of them is compressed or sparse, and may be of any size.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            packed = [
                member.name
                for member in archive
                if member.issparse() or Path(member.name).suffix.lower() in _PACKED_SUFFIXES
            ]
    except tarfile.TarError as error:
        raise UnreadableSourceError(
            f"{visible(Path(path).name)} is no plain .tar archive ({in_one_line(error)}). Unpack "
            "it, or fetch it again."
        ) from error
    if packed:
        raise UnreadableSourceError(
            f"{visible(Path(path).name)} holds {visible(packed[0])!r}, which is compressed or "
            "sparse and may be of any size. Pack the archive again without it."
        )
    return read(path, members)


def _promised_bytes(file: Path) -> int:
    import pyarrow.parquet

    return promised_bytes(file, pyarrow.parquet.read_metadata(file))


def _refuse_growing_table(file: Path) -> None:
    """Refuse a Parquet file of which the library reads all rows at once, if these are far larger.

    Raises:
        UnreadableSourceError: They are.
    """
    import pyarrow.parquet

    found = 0
    try:
        _refuse_growth([file], _promised_bytes(file))
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS_AT_A_TIME):
            found += batch.nbytes
            _refuse_growth([file], found)
    except pyarrow.ArrowException as error:
        raise UnreadableSourceError(
            f"{visible(file.name)} cannot be read ({in_one_line(error)}). Fetch it again."
        ) from error


def _refuse_packed(file: Path) -> int:
    """Refuse an Arrow file whose tables are compressed, or made of dictionaries; give its size.

    The library writes none. Any number of bytes may be in one, which only unpacking would tell.

    Raises:
        UnreadableSourceError: It is one, or one with a footer.
    """
    import pyarrow as pa

    with file.open("rb") as opened:
        if opened.read(len(_WITH_FOOTER)) == _WITH_FOOTER:
            raise UnreadableSourceError(
                f"{visible(file.name)} is an Arrow file with a footer, as pyarrow.ipc.new_file and "
                "Feather write it; of Arrow only streams are read here. Write the table again by "
                "pyarrow.ipc.new_stream or as Parquet, or save the dataset by `save_to_disk`."
            )
    with pa.memory_map(str(file)) as source:
        try:
            messages = pa.ipc.MessageReader.open_stream(source)
            packed = any(_is_packed(bytes(message.metadata)) for message in messages)
        except (pa.ArrowInvalid, struct.error, IndexError) as error:
            raise UnreadableSourceError(
                f"{visible(file.name)} is no Arrow stream, or a damaged one "
                f"({in_one_line(error)}). Get the dataset again, or save it by `save_to_disk`."
            ) from error
    if packed:
        raise UnreadableSourceError(
            f"{visible(file.name)} is an Arrow file whose tables are compressed or made of "
            "dictionaries, which is not read here. Save the dataset by `save_to_disk`."
        )
    return file.stat().st_size


_LOOKS = {"arrow": _refuse_packed, "parquet": _promised_bytes}


def _is_packed(message: bytes) -> bool:
    """Look into a message of Arrow, which is a FlatBuffer: Message.header.compression."""
    (root,) = struct.unpack_from("<I", message)
    kind = _field(message, root, 1)
    header = _field(message, root, 2)
    if not kind or not header or message[kind] == _SCHEMA:
        return False
    if message[kind] != _RECORD_BATCH:
        return True
    (offset,) = struct.unpack_from("<I", message, header)
    return bool(_field(message, header + offset, 3))


def _field(message: bytes, table: int, number: int) -> int:
    """Find where a field of a table of a FlatBuffer lies; 0 for one that was left out."""
    (back,) = struct.unpack_from("<i", message, table)
    begin = table - back
    (size,) = struct.unpack_from("<H", message, begin)
    place = 4 + 2 * number
    if place + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", message, begin + place)
    return table + offset if offset else 0


def folders_below(folder: Path) -> tuple[Path, ...]:
    """Say where the files of a local copy may lie: below it, or where the Hub's cache has them."""
    own = folder.resolve()
    return (own, own.parents[1] / "blobs") if own.parent.name == "snapshots" else (own,)


def _own_file(file: Path, folders: tuple[Path, ...]) -> Path:
    """Return a file that the dataset names.

    Raises:
        UnreadableSourceError: It is no regular file below the folders.
    """
    # "::" makes the library take a path for a chain of addresses.
    found = None if "::" in str(file) else find_below(file, folders)
    if found is None:
        raise UnreadableSourceError(
            f"The dataset in {visible(str(folders[0]))} names {visible(str(file))!r}, which is no "
            "file below that folder, or a link that leads elsewhere. Nothing was read. Put the "
            "file there, or correct README.md or state.json."
        )
    return found


def find_below(file: Path, folders: tuple[Path, ...]) -> Path | None:
    """Find the regular file that a path means; None if it is none, or not below the folders."""
    try:
        found = file.resolve()
        inside = any(found.is_relative_to(folder) for folder in folders)
        return found if inside and found.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL, a circle of links
        return None


def in_one_line(error: Exception) -> str:
    """Say what was raised, in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
