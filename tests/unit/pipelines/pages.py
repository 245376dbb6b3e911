"""Parquet files whose table at their end says less than their pages do."""

from pathlib import Path


def varint(value: int, *, size: int = 0) -> bytes:
    """Put a number that is not negative as Thrift's compact protocol does.

    Args:
        value: The number.
        size: Bytes that it is to take, at least.
    """
    left, told = value << 1, b""
    while left > 0x7F or len(told) < size - 1:
        told += bytes([left & 0x7F | 0x80])
        left >>= 7
    return told + bytes([left])


def tell_less(file: Path) -> None:
    """Have the table of a file with one group of rows say that the group takes 1000 bytes.

    Raises:
        ValueError: It does not say so now.
    """
    import pyarrow.parquet

    honest = varint(pyarrow.parquet.read_metadata(file).row_group(0).total_byte_size)
    data = file.read_bytes()
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    changed = data[begin:].replace(honest, varint(1000, size=len(honest)))
    file.write_bytes(data[:begin] + changed)
    if pyarrow.parquet.read_metadata(file).row_group(0).total_byte_size != 1000:
        raise ValueError(f"{file} has another table than expected")
