"""latents.json: what precomputed latents were made with, checked before it is used.

It lies beside the index of a dataset of latents. A training run compares it with its own settings.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines.documents import DocumentError, belongs, parse_json, unseal
from pipelines.errors import InvalidLatentRecordError, MissingLatentRecordError
from pipelines.latent_format import LatentFormat
from pipelines.source import Source, SourceConfig

RECORD_NAME = "latents.json"
MAX_SCALES = 4
"""Statistics are kept for 1 to as many scales."""

_VERSION = 1
_MAX_BYTES = 1 << 26
_MAX_TEXT = 4096
_MAX_NUMBER = 1 << 32
_ABSENT = "nothing"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class BandStatistics:
    """All elements of one Laplacian band of all latents, shifted and scaled, taken together.

    Attributes:
        mean: Their mean.
        std: Their standard deviation.
    """

    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """What precomputed latents are.

    Attributes:
        autoencoder: Where the autoencoder was.
        autoencoder_sha256: Digest of its architecture, scaling and weights.
        encode_precision: "fp32" or "bf16"; None where another program encoded.
        factor: Pixels of an image for one element of its latent, along each side.
        channels: Channels of the latents.
        scale: The autoencoder's own factor, with which the statistics were taken.
        shift: What it subtracts before.
        image_size: Height and width of the images that were encoded, in pixels.
        views: 2 where the mirrored image follows each image, else 1.
        dtype: "float16" or "float32".
        source: Prefix of the images, or the folder of the arrays that the latents were taken from.
        source_sha256: Digest of the images' index; None where nobody knows the images.
        samples: How many latents there are.
        skipped: Ids in the source of the images that were left out, ascending; each moves the ids
            of the latents after it down by one.
        bands: Statistics of the bands, coarse to fine, for each number of scales that the latents
            can be split into, up to `MAX_SCALES`.
    """

    autoencoder: str
    autoencoder_sha256: str
    encode_precision: Literal["fp32", "bf16"] | None
    factor: int
    channels: int
    scale: float
    shift: float
    image_size: int
    views: Literal[1, 2]
    dtype: Literal["float16", "float32"]
    source: str
    source_sha256: str | None
    samples: int
    skipped: tuple[int, ...]
    bands: Mapping[int, tuple[BandStatistics, ...]]

    @property
    def format(self) -> LatentFormat:
        """How each sample is stored."""
        return LatentFormat(
            dtype=self.dtype,
            views=self.views,
            channels=self.channels,
            size=self.image_size // self.factor,
        )

    def as_json(self) -> dict[str, Any]:
        """Put the record as the content of latents.json."""
        return {"version": _VERSION, **asdict(self)}


class _Problem(Exception):
    """Something in the record is not as it should be."""


def read_latent_record(prefix: str, *, config: SourceConfig | None = None) -> LatentRecord:
    """Read and check what the latents at a prefix are.

    Args:
        prefix: Local folder or URL of one split.
        config: Attempts and time limits.

    Raises:
        MissingLatentRecordError: There is no latents.json.
        InvalidLatentRecordError: It cannot be used, or must not be trusted.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    source = Source(prefix, config=config or SourceConfig())
    try:
        content = source.read(RECORD_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingLatentRecordError(
            f"There is no {RECORD_NAME} at {source.prefix}, so nobody knows which autoencoder its "
            "latents belong to. Check that the prefix is that of one split, or write the latents "
            "with python -m pipelines.ingest.latents."
        ) from error
    record = parse_latent_record(content, prefix=source.prefix)
    if not belongs(parse_json(content), source.read_index):
        raise InvalidLatentRecordError(
            f"{source.prefix}/{RECORD_NAME} is of other latents than the index beside it. Restore "
            "the file, or write the latents again with python -m pipelines.ingest.latents."
        )
    return record


def parse_latent_record(content: bytes, *, prefix: str) -> LatentRecord:
    """Read and check the content of a latents.json.

    Args:
        content: The file's bytes.
        prefix: Where it came from, for messages.

    Raises:
        InvalidLatentRecordError: It cannot be used, or must not be trusted.
    """
    try:
        return _record(content)
    except _Problem as problem:
        raise InvalidLatentRecordError(
            f"{prefix}/{RECORD_NAME} cannot be used: {problem}. Restore the file, or write the "
            "latents again with python -m pipelines.ingest.latents."
        ) from None


def _record(content: bytes) -> LatentRecord:
    try:
        # Records of before have no checksum.
        values = unseal(parse_json(content, max_bytes=_MAX_BYTES), required=False)
    except DocumentError as error:
        raise _Problem(str(error)) from None
    if values.get("version") != _VERSION:
        raise _Problem(f"it is not a record of latents of version {_VERSION}")
    samples = _whole(values, "samples")
    record = LatentRecord(
        autoencoder=_text(values, "autoencoder"),
        autoencoder_sha256=_digest(values, "autoencoder_sha256"),
        encode_precision=_one_of(values, "encode_precision", ("fp32", "bf16", None)),
        factor=_whole(values, "factor"),
        channels=_whole(values, "channels"),
        scale=_number(values, "scale"),
        shift=_number(values, "shift"),
        image_size=_whole(values, "image_size"),
        views=_one_of(values, "views", (1, 2)),
        dtype=_one_of(values, "dtype", ("float16", "float32")),
        source=_text(values, "source"),
        source_sha256=_digest_or_null(values, "source_sha256"),
        samples=samples,
        skipped=_parse_skipped(values, samples=samples),
        bands=_bands(values),
    )
    if record.image_size % record.factor:
        raise _Problem(f"image_size={record.image_size} is no multiple of factor={record.factor}")
    return record


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise _Problem(f"{name} is {str(value)[:40]!r}, not a line of text")
    return value


def _digest(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _Problem(f"{name} is {str(value)[:80]!r}, not a SHA-256 digest")
    return value


def _digest_or_null(values: dict[str, Any], name: str) -> str | None:
    # What is left out is no confession that nobody knows it.
    return None if values.get(name, _ABSENT) is None else _digest(values, name)


def _one_of(values: dict[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    value = values.get(name, _ABSENT)
    # Types count, for True == 1.
    if (type(value), value) not in [(type(choice), choice) for choice in choices]:
        raise _Problem(f"{name} is {str(value)[:40]!r}, not one of {list(choices)}")
    return value


def _whole(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= _MAX_NUMBER:
        raise _Problem(f"{name} is {str(value)[:40]!r}, not a whole number from 1")
    return value


def _number(values: dict[str, Any], name: str) -> float:
    value: Any = values.get(name)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _Problem(f"{name} is {str(value)[:40]!r}, not a number")
    return float(value)


def _parse_skipped(values: dict[str, Any], *, samples: int) -> tuple[int, ...]:
    ids = values.get("skipped")
    if not isinstance(ids, list) or any(type(place) is not int for place in ids):
        raise _Problem("skipped is not a list of ids")
    if sorted(set(ids)) != ids or (ids and not 0 <= ids[0] <= ids[-1] < samples + len(ids)):
        raise _Problem("the ids in skipped do not ascend within those of the source")
    return tuple(ids)


def _bands(values: dict[str, Any]) -> dict[int, tuple[BandStatistics, ...]]:
    bands = values.get("bands")
    if not isinstance(bands, dict) or not 1 <= len(bands) <= MAX_SCALES:
        raise _Problem(f"bands does not hold statistics for 1 to {MAX_SCALES} scales")
    result = {}
    for scales in range(1, len(bands) + 1):
        entries = bands.get(str(scales))
        if not isinstance(entries, list) or len(entries) != scales:
            raise _Problem(f"bands does not hold {scales} bands for {scales} scales")
        statistics = []
        for entry in entries:
            if not isinstance(entry, dict):
                raise _Problem("a band's statistics are not an object")
            statistics.append(
                BandStatistics(mean=_number(entry, "mean"), std=_number(entry, "std"))
            )
        if any(band.std < 0 for band in statistics):
            raise _Problem("a band's deviation is below 0")
        result[scales] = tuple(statistics)
    return result
