"""One whole shard on this node, read sample by sample.

An MDS shard is a count n, n + 1 offsets and n samples. A sample is the lengths of those of its
values that carry one, then the values in the order of the columns; all numbers are little-endian.
streaming's own reader opens and parses the file anew for each sample, which costs as much as
decoding on a GPU; here a file stays open. It is read and nowhere mapped, because a mapped file that
somebody cuts short kills the process.
"""

import functools
import hashlib
import io
import os
import weakref
from pathlib import Path

import numpy as np
import xxhash

from pipelines.index import LABEL_COLUMN, Shard


class MalformedSampleError(Exception):
    """A sample's bytes are not what the columns ask for."""


class ShardFile:
    """A shard whose size, hash and table of offsets have been checked.

    Args:
        path: The file; it is kept open, so it stays readable when its name is removed.
        shard: What the index says of it.
        payload: Column of the images or latents.

    Raises:
        FileNotFoundError: There is no file of that name any more.
        MalformedSampleError: The file was cut short.
    """

    def __init__(self, path: Path, shard: Shard, *, payload: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        table = os.pread(self._descriptor, 4 * (shard.samples + 1), 4)
        if len(table) != 4 * (shard.samples + 1):
            raise MalformedSampleError(f"the file has {4 + len(table)} bytes left")
        self._offsets = np.frombuffer(table, dtype="<u4").astype(np.int64)
        self._columns = [
            (column.name, column.size, not column.encoding.startswith("u"))
            for column in shard.columns
        ]
        self._payload = payload

    def read(self, place: int) -> tuple[bytes, int]:
        """Read the payload and the label of one sample.

        Args:
            place: Its place in the shard.

        Raises:
            MalformedSampleError: The lengths in it do not add up, or the file was cut short.
        """
        begin, end = self._offsets[place : place + 2].tolist()
        sample = os.pread(self._descriptor, end - begin, begin)
        payload, label = b"", 0
        head = 0
        value = 4 * sum(size is None for _, size, _ in self._columns)
        for name, fixed, signed in self._columns:
            size = int.from_bytes(sample[head : head + 4], "little") if fixed is None else fixed
            head += 4 * (fixed is None)
            if name == self._payload:
                payload = sample[value : value + size]
            elif name == LABEL_COLUMN:
                label = int.from_bytes(sample[value : value + size], "little", signed=signed)
            value += size
        if value != end - begin or len(sample) != value:
            raise MalformedSampleError(
                f"its values take {value} bytes and it has {len(sample)} of {end - begin}"
            )
        return payload, label


def file_problem(path: Path, shard: Shard) -> str | None:
    """Say how a file differs from what the index says of it, or None if it does not.

    Raises:
        FileNotFoundError: There is no such file.
    """
    size = path.stat().st_size
    if size != shard.size_bytes:
        return f"is {size} bytes long instead of {shard.size_bytes}"
    # A count, then one offset for each sample and one for the end.
    head_bytes = 4 * (shard.samples + 2)
    with path.open("rb") as file:
        if _digest(shard.hash_name, file) != shard.hash_value:
            return f"does not have the {shard.hash_name} hash in the index"
        file.seek(0)
        head = file.read(head_bytes)
    if len(head) < head_bytes:
        return f"has {len(head)} bytes left"
    table = np.frombuffer(head, dtype="<u4").astype(np.int64)
    offsets = np.concatenate([[head_bytes], table[1:], [shard.size_bytes]])
    if table[0] != shard.samples or np.any(np.diff(offsets) < 0):
        return "does not hold the table of samples that the format asks for"
    return None


def _digest(name: str, file: io.BufferedReader) -> str:
    """Hash a file by an algorithm that streaming knows, by its name."""
    algorithm = getattr(xxhash, name, None) or functools.partial(hashlib.new, name)
    return hashlib.file_digest(file, algorithm).hexdigest()
