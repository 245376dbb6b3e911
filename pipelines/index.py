"""index.json of an MDS dataset, checked before anything in it is used.

The index comes from a store that others may write to, and it names files and sizes. So names are
confined to the dataset's folder, sizes are bounded, encodings come from a short list without
pickle, and every shard must carry a hash.
"""

import re
from dataclasses import dataclass
from typing import Any

from pipelines.documents import DocumentError, parse_json
from pipelines.errors import EmptyDatasetError, InvalidIndexError
from pipelines.latent_format import MOMENTS_COLUMN, LatentFormat

INDEX_NAME = "index.json"
IMAGE_COLUMN = "image"
LABEL_COLUMN = "label"

# Hash algorithms that are checked, strongest first.
HASHES = ("sha256", "sha512", "blake2b", "sha1", "xxh128", "xxh3_128", "xxh3_64", "xxh64", "md5")

_IMAGE_ENCODINGS = {"bytes", "jpeg", "png"}
_LABEL_SIZES = {"int": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
_LABEL_SIZES |= {"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1}
_OTHER_SIZES: dict[str, int | None] = {"str": None, "float64": 8, "float32": 4, "float16": 2}
_COLUMN_SIZES = dict.fromkeys(sorted(_IMAGE_ENCODINGS)) | _LABEL_SIZES | _OTHER_SIZES

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}){0,3}")
_HEX = re.compile(r"[0-9a-f]{8,128}")
_MAX_SHARD_BYTES = (1 << 32) - 1  # offsets inside a shard are 32 bit


@dataclass(frozen=True, kw_only=True)
class Column:
    """One field of a sample.

    Attributes:
        name: Its name.
        encoding: MDS encoding.
        size: Bytes of a value, or None where each value carries its length.
    """

    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of samples.

    Attributes:
        name: Path under the dataset's prefix.
        size_bytes: Length of the file.
        samples: Samples in it.
        hash_name: Algorithm of `hash_value`, one of `HASHES`.
        hash_value: Lower-case hexadecimal digest of the file.
        columns: Fields of each sample, in the order they are stored.
    """

    name: str
    size_bytes: int
    samples: int
    hash_name: str
    hash_value: str
    columns: tuple[Column, ...]

    @property
    def latents(self) -> LatentFormat | None:
        """Format of the latents in it; None if it holds images."""
        kinds = {column.name: column.encoding for column in self.columns}
        return LatentFormat.parse(kinds.get(MOMENTS_COLUMN, ""))


class _Problem(Exception):
    """Something in the index is not as it should be."""


def parse_index(content: bytes, *, prefix: str) -> tuple[Shard, ...]:
    """Read and check an index.

    Args:
        content: The file's bytes.
        prefix: Where it came from, for messages.

    Returns:
        The shards, in the order of their sample ids.

    Raises:
        InvalidIndexError: It cannot be used, or must not be trusted.
        EmptyDatasetError: It lists no samples.
    """
    try:
        shards = _shards(content)
    except _Problem as problem:
        raise InvalidIndexError(
            f"{prefix}/{INDEX_NAME} cannot be used: {problem}. Write the dataset again with "
            "pipelines.ingest, or with streaming's MDSWriter using the columns image (bytes) or "
            "moments (ndarray) and label (int), at least one of the hashes "
            f"{', '.join(HASHES)}, and no compression."
        ) from None
    if not shards:
        raise EmptyDatasetError(
            f"The dataset at {prefix} holds no samples. Check that the ingest that wrote it found "
            "its source images, and write it again."
        )
    return shards


def _shards(content: bytes) -> tuple[Shard, ...]:
    try:
        index = parse_json(content)
    except DocumentError as error:
        raise _Problem(str(error)) from None
    if not isinstance(index, dict) or index.get("version") != 2:
        raise _Problem("it is not an MDS index of version 2")
    entries = index.get("shards")
    if not isinstance(entries, list):
        raise _Problem("its shards are not a list")
    shards: list[Shard] = []
    names = set()
    for number, entry in enumerate(entries):
        try:
            shard = _shard(entry)
            if shard.name.lower() in names:
                raise _Problem(f"the name {shard.name!r} is used twice")
            if shards and shard.latents != shards[0].latents:
                raise _Problem("samples are of another kind than in shard 0")
        except _Problem as problem:
            raise _Problem(f"in shard {number}, {problem}") from None
        names.add(shard.name.lower())
        shards.append(shard)
    return tuple(shard for shard in shards if shard.samples)


def _shard(entry: Any) -> Shard:
    if not isinstance(entry, dict):
        raise _Problem("the entry is not an object")
    if entry.get("format") != "mds" or entry.get("version") != 2:
        raise _Problem(f"the format is {entry.get('format')!r}, not MDS of version 2")
    if entry.get("compression") or entry.get("zip_data"):
        raise _Problem(f"the compression {entry.get('compression')!r} is not read here")
    data = entry.get("raw_data")
    if not isinstance(data, dict):
        raise _Problem("there is no raw_data")
    samples = _whole(entry.get("samples"), name="samples", limit=_MAX_SHARD_BYTES // 4)
    size = _whole(data.get("bytes"), name="bytes", limit=_MAX_SHARD_BYTES)
    if size < 4 * (samples + 2):
        raise _Problem(f"{size} bytes cannot hold {samples} samples")
    hash_name, hash_value = _hash(data.get("hashes"))
    return Shard(
        name=_name(data.get("basename")),
        size_bytes=size,
        samples=samples,
        hash_name=hash_name,
        hash_value=hash_value,
        columns=_columns(entry),
    )


def _whole(value: Any, *, name: str, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise _Problem(f"{name} is {str(value)[:40]!r}, not a whole number up to {limit}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value.lower() == INDEX_NAME:
        raise _Problem(f"the file name {str(value)[:80]!r} is not a plain name under the prefix")
    return value


def _hash(hashes: Any) -> tuple[str, str]:
    if not isinstance(hashes, dict):
        raise _Problem("there are no hashes")
    for name in HASHES:
        value = hashes.get(name)
        if isinstance(value, str) and _HEX.fullmatch(value):
            return name, value
    raise _Problem(f"there is no usable hash (found {sorted(map(str, hashes))[:5]})")


def _columns(entry: dict[str, Any]) -> tuple[Column, ...]:
    lists = [entry.get(f"column_{part}") for part in ("names", "encodings", "sizes")]
    if not all(isinstance(part, list) and 0 < len(part) < 100 for part in lists):
        raise _Problem("the columns are not listed")
    names, encodings, sizes = (part or [] for part in lists)
    if not len(names) == len(encodings) == len(sizes):
        raise _Problem("the lists of columns differ in length")
    columns = []
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        if not isinstance(name, str) or not isinstance(encoding, str):
            raise _Problem("a column's name or encoding is not text")
        if encoding not in _COLUMN_SIZES and LatentFormat.parse(encoding) is None:
            raise _Problem(f"column {name[:80]!r} has the unknown encoding {encoding[:80]!r}")
        if size != _size(encoding):
            raise _Problem(f"column {name[:80]!r} is {encoding} of the wrong size {size!r}")
        columns.append(Column(name=name, encoding=encoding, size=_size(encoding)))
    kinds = {column.name: column.encoding for column in columns}
    if len(kinds) != len(columns):
        raise _Problem("a column is listed twice")
    latents = LatentFormat.parse(kinds.get(MOMENTS_COLUMN, ""))
    if (kinds.get(IMAGE_COLUMN) in _IMAGE_ENCODINGS) == (latents is not None):
        raise _Problem(
            f"there must be one column {IMAGE_COLUMN!r} of {sorted(_IMAGE_ENCODINGS)}, or one "
            f"{MOMENTS_COLUMN!r} of latents, and not both"
        )
    if kinds.get(LABEL_COLUMN) not in _LABEL_SIZES:
        raise _Problem(f"there is no column {LABEL_COLUMN!r} of integers")
    return tuple(columns)


def _size(encoding: str) -> int | None:
    """Bytes of a value, or None where each value carries its length."""
    latents = LatentFormat.parse(encoding)
    return _COLUMN_SIZES[encoding] if latents is None else latents.sample_bytes
