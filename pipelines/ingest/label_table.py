"""Labels of images that are kept apart from them: in a table, or in files beside them.

A table names images and never opens them: its rows are looked up among the images of the source,
so that a table from elsewhere cannot reach other files.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from pipelines.console import visible
from pipelines.documents import parse_json, read_bounded
from pipelines.errors import UnreadableSourceError
from pipelines.ingest.source_files import Entry

MAX_LABEL_BYTES = 1 << 28
_MAX_CLS_BYTES = 256
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_id", "id", "name")
_LABEL_COLUMNS = ("label", "class", "category", "target", "class_name", "breed")
_EXAMPLE = 'columns file_name and label, or lines such as {"file_name": "1.jpg", "label": "cat"}'


def labels_of(images: Sequence[Entry], table: Path) -> tuple[list[str | None], int]:
    """Look up the label of each image in a table.

    Rows name images by their path in the source, or by what is different of it: name, or name
    without suffix.

    Args:
        images: The images.
        table: A .csv, .tsv or .jsonl file.

    Returns:
        The label of each image, None for one that the table does not name; and the number of rows
        that name no image.

    Raises:
        UnreadableSourceError: The table cannot be read, or gives an image two labels.
    """
    places: list[dict[str, int | None]] = [{}, {}, {}]
    for number, image in enumerate(images):
        path = PurePosixPath(*image.parts)
        for names, name in zip(places, (str(path), path.name, path.stem), strict=True):
            names[name] = None if name in names else number
    labels: list[str | None] = [None] * len(images)
    strangers = 0
    for row, (name, label) in enumerate(_rows(table), 1):
        wanted = str(PurePosixPath(name))
        known = (names.get(wanted) for names in places)
        found = next((number for number in known if number is not None), None)
        if found is None:
            strangers += 1
            continue
        before = labels[found] or label
        if before != label:
            raise UnreadableSourceError(
                f"{table} gives the image {visible(name)!r} two labels, {visible(before)!r} and, "
                f"in row {row}, {visible(label)!r}. Leave one of them in the table."
            )
        labels[found] = label or None
    return labels, strangers


def labels_beside(images: Sequence[Entry], others: Sequence[Entry]) -> list[str | None]:
    """Read the label of each image from the .cls file of its name, as in webdataset's shards.

    Raises:
        OSError: A file cannot be read.
        UnreadableSourceError: One holds more than a label.
    """
    beside = {sample_key(other): other for other in others if other.passed_over == ".cls"}
    return [
        _read(beside[sample_key(image)]) if sample_key(image) in beside else None
        for image in images
    ]


def sample_key(entry: Entry) -> tuple[str, ...]:
    """Give what the files of one sample of webdataset have in common: shard and first name."""
    return (str(entry.path), *entry.parts[:-1], entry.parts[-1].split(".")[0])


def _read(entry: Entry) -> str | None:
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(min(entry.size, _MAX_CLS_BYTES + 1))
    if len(content) > _MAX_CLS_BYTES:
        raise UnreadableSourceError(
            f"{visible('/'.join(entry.parts))} holds more than {_MAX_CLS_BYTES} bytes, which is "
            "no label. Give the labels in a table by --labels FILE."
        )
    return content.decode("utf-8", "surrogateescape").strip() or None


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Put labels in order: whole numbers by their value, all others as texts.

    Raises:
        UnreadableSourceError: One is a negative number, which stands for an unknown class.
    """
    numbers = {label: int(label) for label in labels if _WHOLE_NUMBER.fullmatch(label)}
    if len(numbers) < len(labels):
        return tuple(sorted(labels))
    if min(numbers.values(), default=0) < 0:
        raise UnreadableSourceError(
            f"The label {min(numbers.values())} is no class; negative numbers stand for an unknown "
            "one. Remove those rows, or give the classes names."
        )
    return tuple(sorted(numbers, key=lambda label: (numbers[label], label)))


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """Read a table as pairs of file and label."""
    try:
        if table.suffix.lower() == ".jsonl":
            yield from _json_rows(table)
        elif table.suffix.lower() in (".csv", ".tsv"):
            yield from _csv_rows(table)
        else:
            raise ValueError("it does not end in .csv, .tsv or .jsonl")
    except (OSError, ValueError, LookupError, csv.Error) as error:
        raise UnreadableSourceError(
            f"The labels {visible(str(table))} cannot be read ({visible(str(error))}). Give a "
            f".csv, .tsv or .jsonl file with {_EXAMPLE}."
        ) from error


def _open(table: Path, *, newline: str | None = None) -> TextIO:
    content = io.BytesIO(read_bounded(table, max_bytes=MAX_LABEL_BYTES))
    return io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)


def _csv_rows(table: Path) -> Iterator[tuple[str, str]]:
    with _open(table, newline="") as file:
        rows = csv.DictReader(file, delimiter="," if table.suffix.lower() == ".csv" else "\t")
        columns = [name.strip().lower() for name in rows.fieldnames or ()]
        rows.fieldnames = columns
        chosen = _columns(columns)
        for row in rows:
            yield _pair(row, chosen, row_number=rows.line_num)


def _json_rows(table: Path) -> Iterator[tuple[str, str]]:
    with _open(table) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = parse_json(line.encode())
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds no object")
            yield _pair(row, _columns(list(row)), row_number=number)


def _columns(names: Sequence[str]) -> tuple[str, str]:
    """Choose the columns of files and of labels."""
    file = next((name for name in _FILE_COLUMNS if name in names), None)
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    if file is None or label is None:
        raise ValueError(f"its columns are {', '.join(map(str, names))[:200]}")
    return file, label


def _pair(row: Mapping[str, Any], columns: tuple[str, str], *, row_number: int) -> tuple[str, str]:
    file, label = row[columns[0]], row[columns[1]]
    label = "" if label is None else label
    if not isinstance(file, str) or not isinstance(label, str | int) or isinstance(label, bool):
        raise ValueError(f"row {row_number} gives no file and label")
    return file, str(label).strip()
