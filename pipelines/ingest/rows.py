"""Images in the rows of an Arrow table: where they are, until they are written.

A row may name a file instead of holding an image. Whoever made the table chose that name, so only
regular files below the dataset's own folders are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.console import visible
from pipelines.encoded import BadImageError
from pipelines.ingest.listing import MAX_IMAGE_BYTES


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """A column of encoded images.

    Attributes:
        dataset: The Hugging Face dataset. A process that writes some of its rows gets to know where
            its files lie, and maps them into memory.
        name: Name of the column.
        folders: Where the files may lie that rows name; relative names begin at the first.
        version: What becomes another text when the dataset changes.
    """

    dataset: Any
    name: str
    folders: tuple[Path, ...]
    version: str

    def read(self, row: int) -> bytes:
        """Read the encoded image of one row: its own bytes, or the file that it names.

        Raises:
            OSError: The file cannot be read.
            BadImageError: The row holds no image, or names too large a file or one elsewhere.
        """
        value = self.dataset[row][self.name]
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value["path"]:
            file = self.file(value["path"])
            if file is None:
                raise BadImageError("the row names no file below the dataset's folder")
            if file.stat().st_size > MAX_IMAGE_BYTES:
                raise BadImageError(f"its file holds more than {MAX_IMAGE_BYTES} bytes")
            content = file.read_bytes()
        if not content:
            raise BadImageError("the row holds no image")
        return bytes(content)

    def file(self, path: str) -> Path | None:
        """Find the regular file that a row names; None if there is none below the folders."""
        if "\0" in path or not self.folders:
            return None
        try:
            file = (self.folders[0] / path).resolve()
            inside = any(file.is_relative_to(folder) for folder in self.folders)
            return file if inside and file.is_file() else None
        except OSError:  # a name that is too long, a circle of links
            return None


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
        dataset.select_columns([column]), column, folders=folders, version=dataset._fingerprint
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
