"""latents.json: what precomputed latents were made with, checked before it is used.

It lies beside the index of a dataset of latents. A training run compares it with its own settings.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipelines.documents import DocumentError, belongs, parse_json, unseal, validate_as
from pipelines.errors import InvalidLatentRecordError, MissingLatentRecordError
from pipelines.latent_format import LatentFormat
from pipelines.source import Source, SourceConfig

RECORD_NAME = "latents.json"
MAX_SCALES = 4
"""Statistics are kept for 1 to as many scales."""

_VERSION = 1
_MAX_BYTES = 1 << 26
_MAX_TEXT = 4096


def _check_line(text: str) -> str:
    if not 0 < len(text) <= _MAX_TEXT or not text.isprintable():
        raise ValueError("it is no line of text")
    return text


def _check_whole(value: object) -> object:
    if type(value) is not int:  # True == 1
        raise ValueError("it is no whole number")
    return value


_Line = Annotated[str, AfterValidator(_check_line)]
_Views = Annotated[Literal[1, 2], BeforeValidator(_check_whole)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Whole = Annotated[int, Field(ge=1, le=1 << 32)]


@dataclass(frozen=True, kw_only=True)
class BandStatistics:
    """All elements of one Laplacian band of all latents, shifted and scaled, taken together.

    Attributes:
        mean: Their mean.
        std: Their standard deviation.
    """

    mean: float
    std: Annotated[float, Field(ge=0)]


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

    autoencoder: _Line
    autoencoder_sha256: _Digest
    encode_precision: Literal["fp32", "bf16"] | None
    factor: _Whole
    channels: _Whole
    scale: float
    shift: float
    image_size: _Whole
    views: _Views
    dtype: Literal["float16", "float32"]
    source: _Line
    source_sha256: _Digest | None
    samples: _Whole
    skipped: tuple[int, ...]
    bands: Annotated[Mapping[int, tuple[BandStatistics, ...]], Field(max_length=MAX_SCALES)]

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
    source = Source(prefix, config=config)
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
        if values.get("version") != _VERSION:
            raise _Problem(f"it is not a record of latents of version {_VERSION}")
        record = validate_as(LatentRecord, values)
    except DocumentError as error:
        raise _Problem(str(error)) from None
    if record.image_size % record.factor:
        raise _Problem(f"image_size={record.image_size} is no multiple of factor={record.factor}")
    ids = list(record.skipped)
    if sorted(set(ids)) != ids or (ids and not 0 <= ids[0] <= ids[-1] < record.samples + len(ids)):
        raise _Problem("the ids in skipped do not ascend within those of the source")
    for scales in range(1, max(1, len(record.bands)) + 1):
        if len(record.bands.get(scales, ())) != scales:
            raise _Problem(f"bands does not hold {scales} bands for {scales} scales")
    return record
