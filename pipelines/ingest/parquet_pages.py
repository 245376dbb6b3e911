"""The pages of a Parquet file: how much they promise to hold, said without unpacking any.

A reader makes room for what the header of a page says, and then unpacks it. The table at the end of
the file says how much that is as well, but nobody compares the two, so the headers are looked at.
They are structs of Thrift's compact protocol.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.console import visible
from pipelines.errors import UnreadableSourceError

_VALUE_BYTES = (
    8  # of one value: it may be a number of so many, and said any number of times at once
)
_HEADERS = (5, 7, 8)  # of a page of data, of a dictionary, and of a page of data of version 2
_MAX_DEPTH = 16
_I32, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 5, 7, 8, 9, 10, 11, 12
_BOOLS, _WHOLE_NUMBERS = (1, 2), (4, 5, 6)


class _DamageError(Exception):
    """A file's bytes are no headers and pages."""


def promised_bytes(file: Path, told: Any) -> int:
    """Say how many bytes the pages of a Parquet file hold when they are unpacked, at most.

    Args:
        file: The file.
        told: The table at its end, as pyarrow reads it: where the pages are.

    Raises:
        UnreadableSourceError: Its columns are not made of pages.
    """
    groups = [told.row_group(number) for number in range(told.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    size = file.stat().st_size
    try:
        # Or a few kilobytes of columns that lie upon each other could be read without end.
        if sum(max(chunk.total_compressed_size, 0) for chunk in chunks) > size:
            raise _DamageError("the columns are longer than the file")
        found = 0
        with file.open("rb") as opened:
            for chunk in chunks:
                begin = chunk.data_page_offset
                if chunk.dictionary_page_offset:  # some writers say 0 where there is none
                    begin = min(begin, chunk.dictionary_page_offset)
                if begin < 0:
                    raise _DamageError("a column begins before the file")
                found += sum(_pages(opened, begin, min(begin + chunk.total_compressed_size, size)))
    except _DamageError as error:
        raise UnreadableSourceError(
            f"{visible(file.name)} is a damaged Parquet file ({error}). Fetch it again."
        ) from error
    return max(found, sum(int(group.total_byte_size) for group in groups))


def _pages(file: BinaryIO, place: int, end: int) -> Iterator[int]:
    """Say of each page how many bytes it holds when it is unpacked, at most."""
    while place < end:
        file.seek(place)
        header = _Header(file, end)
        unpacked, packed = header.numbers.get((2,), -1), header.numbers.get((3,), -1)
        values = [header.numbers.get((kind, 1), 0) for kind in _HEADERS]
        if min(unpacked, packed, *values) < 0:
            raise _DamageError("the header of a page has no sizes")
        yield unpacked + _VALUE_BYTES * sum(values)
        place = file.tell() + packed


class _Header:
    """The header of a page, read from where the file is.

    Args:
        file: The file; afterwards it is behind the header.
        end: Where the header has to end, at last.

    Attributes:
        numbers: Its whole numbers of 32 bits, by the numbers of the fields that lead to each.

    Raises:
        _DamageError: There is no header.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self._end = end
        self.numbers: dict[tuple[int, ...], int] = {}
        self._struct(())

    def _byte(self) -> int:
        byte = self._file.read(1)
        if not byte or self._file.tell() > self._end:
            raise _DamageError("the header of a page is cut short")
        return byte[0]

    def _varint(self) -> int:
        value = 0
        for place in range(10):
            byte = self._byte()
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise _DamageError("a number has more than ten bytes")

    def _skip(self, size: int) -> None:
        if size > self._end - self._file.tell():
            raise _DamageError("the header of a page is cut short")
        self._file.seek(size, 1)

    def _struct(self, path: tuple[int, ...]) -> None:
        field = 0
        while head := self._byte():
            kind, step = head & 0x0F, head >> 4
            field = field + step if step else _signed(self._varint())
            field = (field + 0x8000) % 0x10000 - 0x8000  # 16 bits, in which readers let it run over
            self._value(kind, (*path, field), in_list=False)

    def _value(self, kind: int, path: tuple[int, ...], *, in_list: bool) -> None:
        if len(path) > _MAX_DEPTH:
            raise _DamageError("the header of a page is nested too deep")
        if kind in _BOOLS:
            self._skip(int(in_list))  # the kind of a field says all
        elif kind in _WHOLE_NUMBERS:
            number = _signed(self._varint())
            if kind == _I32 and not in_list:
                self.numbers[path] = number
        elif kind == _STRUCT:
            self._struct(path)
        elif kind in (_LIST, _SET):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 0x0F else head >> 4):
                self._value(head & 0x0F, (*path, 0), in_list=True)
        elif kind == _MAP:
            raise _DamageError("the header of a page holds a map")
        else:
            sizes = {3: 1, _DOUBLE: 8}
            self._skip(self._varint() if kind == _BINARY else sizes.get(kind, self._end))


def _signed(value: int) -> int:
    """Read a number whose lowest bit is its sign, in 32 bits, as readers of the format do."""
    value &= 0xFFFFFFFF
    return (value >> 1) ^ -(value & 1)
