"""Images in the rows of an Arrow table: where they are, until they are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.encoded import BadImageError


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """A column of encoded images.

    Attributes:
        dataset: The Hugging Face dataset. A process that writes some of its rows gets to know where
            its files lie, and maps them into memory.
        name: Name of the column.
    """

    dataset: Any
    name: str

    def read(self, row: int) -> bytes:
        """Read the encoded image of one row: its own bytes, or the file that it names.

        Raises:
            OSError: The file cannot be read.
            BadImageError: The row holds no image.
        """
        value = self.dataset[row][self.name]
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        if not value:
            raise BadImageError("the row holds no image")
        return Path(value).read_bytes() if isinstance(value, str) else bytes(value)


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

    def read(self) -> bytes:
        """Read the encoded image."""
        return self.column.read(self.row)


def list_rows(dataset: Any, *, column: str, labels: Sequence[int]) -> tuple[ImageRow, ...]:
    """List the images of a dataset without reading them.

    Args:
        dataset: A Hugging Face dataset whose images are not decoded.
        column: The column of images: bytes, or pairs of bytes and path.
        labels: Class index of each row.
    """
    held = ImageColumn(dataset.select_columns([column]), column)
    return tuple(
        ImageRow(
            column=held,
            row=row,
            size=size,
            label=label,
            name=f"row {row} ({Path(path).name})" if path else f"row {row}",
        )
        for row, (label, (size, path)) in enumerate(
            zip(labels, _sizes_and_paths(dataset.data.column(column)), strict=True)
        )
    )


def _sizes_and_paths(column: Any) -> Iterator[tuple[int, str | None]]:
    """Look at the lengths of the images, which Arrow keeps beside them, and at their paths."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for chunk in column.chunks:
        pairs = pa.types.is_struct(chunk.type)
        sizes = pc.binary_length(pc.struct_field(chunk, "bytes") if pairs else chunk).to_pylist()
        paths = pc.struct_field(chunk, "path").to_pylist() if pairs else [None] * len(sizes)
        for size, path in zip(sizes, paths, strict=True):
            yield _size_of_file(path) if size is None else size, path


def _size_of_file(path: str | None) -> int:
    file = Path(path) if path else None
    return file.stat().st_size if file and file.is_file() else 0
