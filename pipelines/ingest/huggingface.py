"""Images in the rows of a Hugging Face dataset: where they are, until they are written.

A row may name a file instead of holding an image. Whoever made the table chose that name, so only
regular files below the dataset's own folders are read.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.addresses import may_carry_credentials, quote_address
from pipelines.console import visible
from pipelines.documents import DocumentError, read_bounded
from pipelines.encoded import BadImageError
from pipelines.errors import IngestSettingError, UnreadableSourceError
from pipelines.ingest.huggingface_files import (
    check_saved,
    convert,
    find_below,
    folders_below,
    in_one_line,
    is_saved,
)
from pipelines.ingest.listing import MAX_IMAGE_BYTES, Listing

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load(
    name: str, *, config_name: str | None = None, revision: str | None = None
) -> Mapping[str, Any]:
    """Load all splits of a dataset, which are mapped into memory and not read.

    Args:
        name: Of a dataset on the Hub; or a local folder, or a .parquet file.
        config_name: Which of its configurations, if it has several.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UnreadableSourceError: There is none, or it cannot be loaded.
        IngestSettingError: A local copy has no revisions, or no configurations.
    """
    place = Path(name)
    if not place.exists() and may_carry_credentials(name):
        raise IngestSettingError(
            f"The dataset {quote_address(name)} is no name on the Hub, and may carry credentials, "
            "which would reach logs. Give a name, or a folder; a token in HF_TOKEN."
        )
    saved = is_saved(place)
    for option, value, has_none in (
        ("--revision", revision, place.exists()),
        ("--config-name", config_name, place.is_file() or saved),
    ):
        if value is not None and has_none:
            raise IngestSettingError(
                f"{option} {value} cannot be chosen in {name}, which is a local copy. Leave it "
                "away, or give the name of the dataset on the Hub."
            )
    try:
        import datasets
    except ImportError as error:
        raise UnreadableSourceError(
            "Hugging Face datasets are read by the package `datasets`, which is not installed: "
            "pip install '.[huggingface]' in the folder of this project"
        ) from error
    try:
        loaded = _load(datasets, name, config_name=config_name, revision=revision)
    except UnreadableSourceError:
        raise
    except Exception as error:  # the library raises many kinds
        if isinstance(error.__cause__, UnreadableSourceError):
            raise error.__cause__ from None
        raise UnreadableSourceError(
            f"The dataset {name!r} cannot be loaded ({in_one_line(error)}). {_advice(name)}"
        ) from error
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _load(library: Any, name: str, *, config_name: str | None, revision: str | None) -> Any:
    place = Path(name)
    if is_saved(place):
        check_saved(place)
        return library.load_from_disk(name).with_format(None)
    if place.is_file():
        return convert(library.load_dataset_builder("parquet", data_files=name))
    builder = library.load_dataset_builder(name, config_name, revision=revision)
    return convert(builder, folder=place if place.exists() else None)


def _advice(name: str) -> str:
    if Path(name).exists() or not _HUB_NAME.fullmatch(name):
        return "Give a folder or .parquet file that the library `datasets` can load."
    return (
        "Names are looked up on the Hugging Face Hub, which takes a network, and a token in "
        "HF_TOKEN for datasets that ask for consent. On a machine without a network give a folder "
        f"instead, fetched elsewhere by: hf download --repo-type dataset {name} --local-dir FOLDER"
    )


def folders_of(name: str) -> tuple[Path, ...]:
    """Say where the files of a dataset may lie that its rows name, instead of holding images.

    Args:
        name: Of a dataset on the Hub, whose files the library keeps in its caches; or a local
            folder, or a .parquet file.
    """
    place = Path(name)
    if place.exists():
        return folders_below(place if place.is_dir() else place.parent)
    from datasets import config

    fetched = Path(os.environ.get("HF_HUB_CACHE") or Path(config.HF_CACHE_HOME) / "hub")
    own = fetched.expanduser() / f"datasets--{name.replace('/', '--')}"
    return own.resolve(), Path(config.EXTRACTED_DATASETS_PATH).resolve()


def list_split(
    splits: Mapping[str, Any],
    split: str,
    *,
    image_column: str,
    label_column: str,
    folders: tuple[Path, ...] = (),
) -> Listing:
    """List the images of a split.

    Class names come from the label column where it has them. Other labels, whole numbers or texts,
    are numbered in their order, alike in all splits. A negative number is no class: datasets keep
    the labels of a split to themselves by it.

    Args:
        splits: All splits of a dataset.
        split: Which of them.
        image_column: Name of the column of images.
        label_column: Name of the column of labels.
        folders: Where the files may lie that rows name; see `folders_of`.

    Raises:
        UnreadableSourceError: There is no such split or column, or it is of another kind, or a
            row has no label.
    """
    dataset = _images_of(splits, split, image_column=image_column, label_column=label_column)
    labels = _check(dataset.data.column(label_column), label_column).to_pylist()
    classes, numbers = _classes(splits, dataset.features[label_column], label_column)
    for row, label in enumerate(labels):
        if label not in numbers:
            raise UnreadableSourceError(
                f"Row {row} of the split {split!r} has the label {label!r}, which is no class. "
                "Some datasets keep the labels of their test split to themselves: choose another "
                "split by --split, or another column by --label-column."
            )
    return Listing(
        images=list_rows(
            dataset,
            column=image_column,
            labels=[numbers[label] for label in labels],
            folders=folders,
        ),
        classes=tuple(map(visible, classes)),
    )


def _images_of(
    splits: Mapping[str, Any], split: str, *, image_column: str, label_column: str
) -> Any:
    """Look at a split whose images are not decoded."""
    import datasets

    if split not in splits:
        raise UnreadableSourceError(
            f"There is no split {split!r}; the dataset has {_join(splits)}. Choose one by --split."
        )
    dataset = splits[split]
    for option, name in (("--image-column", image_column), ("--label-column", label_column)):
        if name not in dataset.features:
            raise UnreadableSourceError(
                f"The split {split!r} has no column {name!r}; its columns are "
                f"{_join(dataset.features)}. Choose one by {option}."
            )
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    elif not _holds_bytes(dataset.data.schema.field(image_column).type):
        raise UnreadableSourceError(
            f"The column {image_column!r} holds {dataset.features[image_column]} and no encoded "
            f"images. Choose another of {_join(dataset.features)} by --image-column."
        )
    _check(dataset.data.column(image_column), image_column)
    return dataset


def _classes(
    splits: Mapping[str, Any], feature: Any, column: str
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Name the classes of a column of labels, and number what the column holds of them."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), {label: label for label in range(len(feature.names))}
    values = _values(splits, column)
    return tuple(map(str, values)), {value: number for number, value in enumerate(values)}


def _check(column: Any, name: str) -> Any:
    """Return a column that is what its table says of it: lengths that fit, and texts in UTF-8."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UnreadableSourceError(
            f"The column {name!r} is damaged ({in_one_line(error)}). Download the dataset again."
        ) from error
    return column


def _holds_bytes(kind: Any) -> bool:
    """Tell whether Arrow values are bytes, or pairs of bytes and path as the library has them."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return fields.keys() >= {"bytes", "path"} and pa.types.is_string(fields["path"])
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _values(splits: Mapping[str, Any], column: str) -> list[Any]:
    """Collect the different labels of all splits, in their order."""
    import pyarrow as pa

    found: set[Any] = set()
    kinds = set()
    for dataset in splits.values():
        if column in dataset.features:
            labels = _check(dataset.data.column(column), column)
            if not (pa.types.is_integer(labels.type) or pa.types.is_string(labels.type)):
                raise UnreadableSourceError(
                    f"The column {column!r} holds {labels.type} and no class labels, which are "
                    f"whole numbers or texts. Choose another of {_join(dataset.features)} by "
                    "--label-column."
                )
            kinds.add(pa.types.is_string(labels.type))
            found.update(labels.unique().to_pylist())
    if len(kinds) > 1:
        raise UnreadableSourceError(
            f"The column {column!r} holds whole numbers in some splits and texts in others, so the "
            "classes cannot be numbered alike. Choose another one by --label-column."
        )
    found.discard(None)
    return sorted(value for value in found if isinstance(value, str) or value >= 0)


def _join(names: Any) -> str:
    return ", ".join(map(str, names))


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """A column of encoded images.

    Attributes:
        dataset: The Hugging Face dataset. A process that writes some of its rows gets to know where
            its files lie, and maps them into memory.
        name: Name of the column.
        folders: Where the files may lie that rows name; relative names begin at the first.
        version: What becomes another text when the dataset changes.
        files: What the library has mapped into memory, with the length and time of each. To read
            behind the end of one that was cut short ends the process, which no handler can help.
    """

    dataset: Any
    name: str
    folders: tuple[Path, ...]
    version: str
    files: tuple[tuple[str, tuple[int, int] | None], ...]

    def read(self, row: int) -> bytes:
        """Read the encoded image of one row: its own bytes, or the file that it names.

        Raises:
            OSError: The file cannot be read.
            BadImageError: The row holds no image, or names too large a file or one elsewhere.
            UnreadableSourceError: The dataset was changed since it was listed.
        """
        for mapped, state in self.files:
            if _state(mapped) != state:
                raise UnreadableSourceError(
                    f"{visible(mapped)} was changed while it was taken in, so images of two states "
                    "would be mixed. Run the same command again when it is complete."
                )
        value = self.dataset[row][self.name]
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value["path"]:
            file = self.file(value["path"])
            if file is None:
                raise BadImageError("the row names no file below the dataset's folder")
            try:
                content = read_bounded(file, max_bytes=MAX_IMAGE_BYTES)
            except DocumentError:
                raise BadImageError(f"its file holds more than {MAX_IMAGE_BYTES} bytes") from None
        if not content:
            raise BadImageError("the row holds no image")
        return bytes(content)

    def file(self, path: str) -> Path | None:
        """Find the regular file that a row names; None if there is none below the folders."""
        return find_below(self.folders[0] / path, self.folders) if self.folders else None


def _state(file: str) -> tuple[int, int] | None:
    """Say how long a file is, and when it was changed last; None if there is none any more.

    The time alone may be that of before, as tools that copy files set it.
    """
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """Where one image is.

    Attributes:
        column: What holds it.
        row: Its place there.
        size: Number of bytes; 0 for one that cannot be read.
        label: Class index.
        name: What to call it in messages: the row, and the file it was made from.
    """

    column: ImageColumn
    row: int
    size: int
    label: int
    name: str

    @property
    def version(self) -> str:
        """What becomes another text when the dataset changes."""
        return self.column.version

    def read(self) -> bytes:
        """Read the encoded image."""
        return self.column.read(self.row)


def list_rows(
    dataset: Any, *, column: str, labels: Sequence[int], folders: tuple[Path, ...]
) -> tuple[ImageRow, ...]:
    """List the images of a dataset without reading them.

    Args:
        dataset: A Hugging Face dataset whose images are not decoded.
        column: The column of images: bytes, or pairs of bytes and path.
        labels: Class index of each row.
        folders: Where the files may lie that rows name, without links.
    """
    held = ImageColumn(
        dataset.select_columns([column]),
        column,
        folders=folders,
        version=dataset._fingerprint,
        files=tuple(
            (str(file["filename"]), _state(file["filename"])) for file in dataset.cache_files
        ),
    )
    return tuple(
        ImageRow(
            column=held,
            row=row,
            size=_size_of_file(held.file(path or "")) if size is None else size,
            label=label,
            name=f"row {row} ({visible(Path(path).name)})" if path else f"row {row}",
        )
        for row, (label, (size, path)) in enumerate(
            zip(labels, _sizes_and_paths(dataset.data.column(column)), strict=True)
        )
    )


def _sizes_and_paths(column: Any) -> Iterator[tuple[int | None, str | None]]:
    """Look at the lengths of the images, which Arrow keeps beside them, and at their paths."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for chunk in column.chunks:
        pairs = pa.types.is_struct(chunk.type)
        sizes = pc.binary_length(pc.struct_field(chunk, "bytes") if pairs else chunk).to_pylist()
        paths = pc.struct_field(chunk, "path").to_pylist() if pairs else [None] * len(sizes)
        yield from zip(sizes, paths, strict=True)


def _size_of_file(file: Path | None) -> int:
    return file.stat().st_size if file else 0
